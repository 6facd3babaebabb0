package graph

import (
	"context"
	"math"
	"sync/atomic"

	"qblockd/graph/blk"
)

// access is the way from a node to its driver. It brings requests into the form that the driver can
// take: whole blocks, in memory that is placed as it likes, and no more at a time than it likes.
// Methods that are called as those of drivers call these, contained by the guard. That is written
// out: with a closure each would cost as much as all the rest of what a node does.
type access struct {
	// Set by opened.
	Driver
	guard   *guard
	writer  Writer
	zeroer  Zeroer
	flusher Flusher
	discard Discarder
	status  BlockStatuser
	mapper  Mapper
	copier  CopyRanger
	resizer Resizer
	debug   Debugger
	// Set by refreshed, constant while requests run.
	caps     *Caps
	align    int64  // Caps.Limits.RequestAlign, at least 1
	maxIO    int64  // Caps.Limits.MaxTransfer, a multiple of align, never 0
	memAlign int    // Caps.Limits.MemAlign, at least 1
	zeroes   pieces // in which it likes to zero
	discards pieces // in which it likes to discard

	shown atomic.Pointer[Caps] // caps for those who are no requests
}

// pieces are the parts in which a request is carried out: see blk.Piece.
type pieces struct{ align, most int64 }

// next is the length of the next request for what is left.
func (p pieces) next(off, size int64) int64 { return blk.Piece(off, size, p.align, p.most) }

// opened is called once, by SetDriver, on the still hidden node.
func (a *access) opened(n *Node) {
	a.Driver, a.guard = n.drv, &n.guard
	a.writer, _ = n.drv.(Writer)
	a.zeroer, _ = n.drv.(Zeroer)
	a.flusher, _ = n.drv.(Flusher)
	a.discard, _ = n.drv.(Discarder)
	a.status, _ = n.drv.(BlockStatuser)
	a.mapper, _ = n.drv.(Mapper)
	a.copier, _ = n.drv.(CopyRanger)
	a.resizer, _ = n.drv.(Resizer)
	a.debug, _ = n.drv.(Debugger)
	a.refreshed()
}

// refreshed asks the driver's properties again, after a reopen, while the node is drained.
func (a *access) refreshed() {
	if c := a.Caps(); a.caps == nil || c != *a.caps {
		a.caps = &c
		a.shown.Store(&c)
	}
	l := &a.caps.Limits
	a.align = max(l.RequestAlign, 1)
	a.memAlign = max(l.MemAlign, 1)
	if a.maxIO = a.whole(l.MaxTransfer); a.maxIO == 0 {
		a.maxIO = math.MaxInt64
	}
	a.zeroes = pieces{max(l.ZeroAlign, a.align), a.whole(l.MaxZero)}
	a.discards = pieces{max(l.DiscardAlign, a.align), a.whole(l.MaxDiscard)}
	if invariantsOn {
		a.checkCaps()
	}
}

// whole is as much of a limit as are whole blocks: one at least, if there is a limit.
func (a *access) whole(most int64) int64 {
	if most <= 0 {
		return 0
	}
	return max(blk.AlignDown(most, a.align), a.align)
}

// checkCaps panics where the driver claims what it cannot do or limits make no sense.
func (a *access) checkCaps() {
	l := &a.caps.Limits
	pow2 := func(x int64) bool { return x >= 0 && x&(x-1) == 0 }
	wrong := ""
	switch {
	case a.caps.WriteFlags != 0 && a.writer == nil, a.caps.ZeroFlags != 0 && a.zeroer == nil:
		wrong = "claims flags without the interface behind them"
	case !pow2(l.RequestAlign), !pow2(int64(l.MemAlign)), !pow2(l.ZeroAlign), !pow2(l.DiscardAlign),
		!pow2(l.ClusterSize):
		wrong = "states an alignment that is no power of two"
	case l.MaxTransfer < 0, l.MaxZero < 0, l.MaxDiscard < 0:
		wrong = "states a negative limit"
	}
	if wrong != "" {
		panic("graph: driver " + a.guard.n.DriverName() + " " + wrong)
	}
}

// bounce is the most that goes through one buffer.
func (a *access) bounce() int64 { return min(max(blk.AlignDown(bounceMax, a.align), a.align), a.maxIO) }

// step tells the driver itself, if it wants to know.
func (a *access) step(r *blk.Req, ev blk.DebugEvent) {
	if a.debug != nil {
		a.debug.DebugEvent(r, ev)
	}
}

// read reads [off, off+size), which is inside the node, in one go if the driver can take it so.
func (a *access) read(r *blk.Req, v blk.Vec, off, size int64) error {
	if (off|size)&(a.align-1) == 0 && size <= a.maxIO && (a.memAlign == 1 || v.Aligned(a.memAlign, a.align)) {
		return a.ReadAt(r, v, off, 0)
	}
	return a.readPieces(r, v, off, size)
}

// readPieces reads what the driver cannot take as it is: whole blocks into well-placed memory
// directly, the rest through bounce buffers.
func (a *access) readPieces(r *blk.Req, v blk.Vec, off, size int64) error {
	whole := size <= bounceAll && (off|size)&(a.align-1) != 0
	for done := int64(0); done < size; {
		pos := off + done
		k := min(blk.Piece(pos, size-done, a.align, a.maxIO), size-done)
		if !whole && blk.IsAligned(pos, k, a.align) {
			if p := v.Slice(done, k); p.Aligned(a.memAlign, a.align) {
				if err := a.ReadAt(r, p, pos, 0); err != nil {
					return err
				}
				done += k
				continue
			}
		}
		lo, end := blk.AlignDown(pos, a.align), pos+k
		if whole {
			end = off + size
		}
		hi := min(blk.AlignUp(end, a.align), lo+a.bounce())
		b := blk.GetBuf(int(hi-lo), a.memAlign)
		err := a.ReadAt(r, blk.Buf(b.B), lo, 0)
		if err == nil {
			k = min(hi-pos, size-done)
			v.Slice(done, k).CopyIn(b.B[pos-lo:])
			done += k
		}
		blk.PutBuf(b)
		if err != nil {
			return err
		}
	}
	return nil
}

// readBlock fills b with whole blocks at lo for a read-modify-write; beyond the end there are
// zeroes.
func (a *access) readBlock(r *blk.Req, b []byte, lo int64) error {
	if lo >= a.Size() {
		clear(b)
		return nil
	}
	return a.read(r, blk.Buf(b), lo, int64(len(b)))
}

// write writes whole blocks in one go if the driver can take them so.
func (a *access) write(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	f &= a.caps.WriteFlags
	if a.debug != nil {
		a.debug.DebugEvent(r, blk.EvPwritev)
		defer a.debug.DebugEvent(r, blk.EvPwritevDone)
	}
	if size <= a.maxIO && (a.memAlign == 1 || v.Aligned(a.memAlign, a.align)) {
		return a.WriteAt(r, v, off, f)
	}
	return a.writePieces(r, v, off, size, f)
}

// writePieces writes whole blocks in parts, through bounce buffers where the memory is badly
// placed.
func (a *access) writePieces(r *blk.Req, v blk.Vec, off, size int64, f blk.Flags) error {
	for done := int64(0); done < size; {
		k := min(size-done, a.maxIO)
		p := v
		if k < size {
			p = v.Slice(done, k)
		}
		var b *blk.Buffer
		if !p.Aligned(a.memAlign, a.align) {
			k = min(k, a.bounce())
			b = blk.GetBuf(int(k), a.memAlign)
			v.Slice(done, k).CopyOut(b.B)
			p = blk.Buf(b.B)
		}
		err := a.WriteAt(r, p, off+done, f)
		blk.PutBuf(b)
		if err != nil {
			return err
		}
		if done += k; done < size {
			if err := r.Stopped(); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeZeroes writes k zero bytes, at most maxIO.
func (a *access) writeZeroes(r *blk.Req, off, k int64, f blk.Flags) error {
	if k <= blk.ZeroMax && a.memAlign <= 4096 {
		return a.WriteAt(r, blk.Buf(blk.Zeroes(int(k))), off, f)
	}
	b := blk.GetBuf(int(k), a.memAlign)
	defer blk.PutBuf(b)
	clear(b.B)
	return a.WriteAt(r, blk.Buf(b.B), off, f)
}

// zeroSteps tells whether zeroing needs more than a single call of the driver.
func (a *access) zeroSteps(off, size int64, f blk.Flags) bool {
	return a.zeroer == nil || f&blk.FUA&^a.caps.ZeroFlags != 0 || a.zeroes.next(off, size) < size
}

// zeroRagged tells whether zeroing takes several calls of the driver of which the outer ones cover
// blocks in part, so that it could fail half-way for lack of support.
func (a *access) zeroRagged(off, size int64) bool {
	in, end := a.zeroes.align-1, off+size
	return a.zeroes.next(off, size) < size && (off&in != 0 || end&in != 0 && end != a.Size())
}

// ReadAt calls that of the driver.
func (a *access) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.Driver.ReadAt(r, v, off, f)
}

// WriteAt calls that of the driver.
func (a *access) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.writer.WriteAt(r, v, off, f)
}

// Zero calls that of the driver.
func (a *access) Zero(r *blk.Req, off, n int64, f blk.Flags) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.zeroer.Zero(r, off, n, f)
}

// Flush calls that of the driver.
func (a *access) Flush(r *blk.Req) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.flusher.Flush(r)
}

// Discard calls that of the driver.
func (a *access) Discard(r *blk.Req, off, n int64) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.discard.Discard(r, off, n)
}

// Status calls that of the driver.
func (a *access) Status(r *blk.Req, off, n int64) (x blk.Extent, err error) {
	if err := a.guard.usable(); err != nil {
		return x, err
	}
	defer a.guard.caught(&err)
	return a.status.Status(r, off, n)
}

// Map calls that of the driver.
func (a *access) Map(r *blk.Req, off, n int64, m *blk.Mapping) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.mapper.Map(r, off, n, m)
}

// CopyFrom calls that of the driver.
func (a *access) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.copier.CopyFrom(r, off, src, f)
}

// Resize calls that of the driver.
func (a *access) Resize(ctx context.Context, size int64, m blk.Prealloc) (err error) {
	if err := a.guard.usable(); err != nil {
		return err
	}
	defer a.guard.caught(&err)
	return a.resizer.Resize(ctx, size, m)
}
