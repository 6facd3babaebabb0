// Package blk is the vocabulary of the data plane: buffers, flags, requests, extents,
// limits and error sentinels. It holds values only; nothing here does I/O or waits.
package blk

import (
	"context"

	"qblockd/graph/bitmap"
)

// SectorSize is the unit, in bytes, of the sizes of disks and of what counts in sectors.
const SectorSize = 512

// Flags qualify one operation (not the whole unit of work, see Req).
type Flags uint32

const (
	// FUA: on return the written range is on stable storage.
	FUA Flags = 1 << iota
	// MayUnmap: a zeroed range may be deallocated.
	MayUnmap
	// NoFallback: zero only if that is faster than writing; else ErrNotSupported, nothing changed.
	NoFallback
	// Compressed: store the range compressed (formats that can).
	Compressed
	// WriteUnchanged: the guest-visible data does not change (copy-on-read, stream); needs
	// only the write-unchanged permission.
	WriteUnchanged
	// Serialising: no overlapping request runs at the same time; set by jobs.
	Serialising
	// Grow: a write through a root may go beyond the end and make the node longer (image
	// creation); needs the resize permission. Nodes may do so with their children without it.
	Grow
	// CopyOnRead: what the node read from has not allocated is written to it; needs the
	// write-unchanged permission.
	CopyOnRead
)

// Req is one unit of work: a client's request with all that filters and formats do for
// it, or one extent of a job. It holds the pass through its root's gate. Roots pool them;
// a driver passes the Req it was given on to its children and never keeps it.
// One Req is used by one goroutine at a time.
type Req struct {
	// Ctx is the root's context: done when the root is being torn down hard. Never derived per
	// request.
	Ctx context.Context
	// NoWait: no waiting of any kind; ErrWouldBlock instead (design: Requests, gates and draining).
	NoWait bool
	// Job marks requests of background work (error accounting, not guest latency).
	Job bool
	// Unrecorded is a dirty bitmap that does not record what the request writes: who issued it
	// keeps the bitmap's books. Nil mostly.
	Unrecorded *bitmap.Bitmap

	// Pass is the root's own bookkeeping of the gate passage; nobody else touches it.
	Pass any
}

// Done is closed when the root is being torn down hard; nil if there is no Ctx to tell.
func (r *Req) Done() <-chan struct{} {
	if r.Ctx == nil {
		return nil
	}
	return r.Ctx.Done()
}

// Stopped is the reason why a request of several parts should not go on to the next one, or nil.
func (r *Req) Stopped() error {
	if r.Ctx == nil || r.Ctx.Err() == nil {
		return nil
	}
	return context.Cause(r.Ctx)
}

// Await waits until c is closed. Error: the cause of the end of r's context, which came first.
func (r *Req) Await(c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-r.Done():
		return context.Cause(r.Ctx)
	}
}

// Child identifies the edge an extent's offset refers to; *graph.Edge is one.
type Child interface{ ChildName() string }

// Extent is the answer to a block-status question: the first N bytes from the offset
// asked share these properties. N is at least 1 and at most what was asked.
type Extent struct {
	N int64
	// Data: content is stored (reads touch the medium).
	Data bool
	// Zero: reads as zeroes.
	Zero bool
	// Allocated: content is decided by this layer, not by the backing chain.
	Allocated bool
	// Compressed: stored compressed, cannot be mapped.
	Compressed bool
	// OffValid: the bytes lie at MapOff of child In (nil: of this node's own host file).
	OffValid bool
	MapOff   int64
	// Raw: the answer is wholly In's at MapOff; ask there.
	Raw bool
	// Recurse: In may know more about zeroes within the data; asking is optional.
	Recurse bool
	In      Child
	// EOF: the extent ends at the end of the node.
	EOF bool
	// Depth is set by StatusAbove: 0 = in none of the layers asked, 1 = in the topmost, ...
	Depth int
}

// Whole makes x, found at off, where a block of align bytes, a power of two, begins, end with a
// block or at end: blocks are copied as a whole. One that is zero in part only is data.
func (x Extent) Whole(off, end, align int64) Extent {
	if off+x.N >= end {
		x.N = end - off
		return x
	}
	if n := AlignDown(off+x.N, align) - off; x.Zero && n > 0 {
		x.N = n
		return x
	}
	return Extent{N: min(AlignUp(off+x.N, align), end) - off, Data: true}
}

// Limits of a driver, in bytes; 0 means none (or 1 for alignments). All alignments are powers of
// two.
type Limits struct {
	// RequestAlign: offset and length of reads and writes must be multiples; the generic layer
	// does read-modify-write for what is not.
	RequestAlign int64
	// MemAlign: address alignment of buffers (O_DIRECT); the generic layer bounces.
	MemAlign int
	// OptTransfer is the preferred size, MaxTransfer the largest.
	OptTransfer, MaxTransfer int64
	// ZeroAlign, DiscardAlign: preferred alignments; unaligned heads and tails are split off.
	ZeroAlign, MaxZero       int64
	DiscardAlign, MaxDiscard int64
	// ClusterSize is the allocation unit of a format; 0: none.
	ClusterSize int64
}

// Prealloc is the preallocation mode of create and resize (QAPI PreallocMode).
type Prealloc string

const (
	PreallocOff      Prealloc = "off"
	PreallocMetadata Prealloc = "metadata"
	PreallocFalloc   Prealloc = "falloc"
	PreallocFull     Prealloc = "full"
)
