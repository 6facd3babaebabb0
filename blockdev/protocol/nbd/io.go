package nbd

import (
	"context"
	"math"
	"syscall"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// A size that is no multiple of sectors is rounded up for the graph: what is beyond the server's
// size reads as zeroes, and only zeroes can be written there.

// inside is how many of n bytes from off on the server has.
func (d *disk) inside(off, n int64) int64 { return max(min(n, d.e.size-off), 0) }

// ReadAt implements graph.Driver.
func (d *disk) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	if k := d.inside(off, n); k < n {
		if r.NoWait {
			return blk.ErrWouldBlock
		}
		v.Slice(k, n-k).Zero()
		if k == 0 {
			return nil
		}
		v, n = v.Slice(0, k), k
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdRead, Off: uint64(off), Len: uint64(n)}
	_, err := d.link.do(r, q, body{in: v})
	return err
}

// WriteAt implements graph.Writer.
func (d *disk) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	n := v.Len()
	if k := d.inside(off, n); k < n {
		if !v.Slice(k, n-k).IsZero() {
			return syscall.ENOSPC
		}
		if k == 0 {
			return nil
		}
		v, n = v.Slice(0, k), k
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdWrite, Off: uint64(off), Len: uint64(n)}
	if f&blk.FUA != 0 && d.e.has(nbdwire.FlagFUA) {
		q.Flags = nbdwire.CmdFlagFUA
	}
	_, err := d.link.do(r, q, body{out: v})
	return err
}

// Zero implements graph.Zeroer.
func (d *disk) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if !d.e.has(nbdwire.FlagWriteZeroes) {
		return blk.ErrNotSupported
	}
	if n = d.inside(off, n); n == 0 {
		return nil
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdWriteZeroes, Off: uint64(off), Len: uint64(n)}
	if f&blk.FUA != 0 && d.e.has(nbdwire.FlagFUA) {
		q.Flags |= nbdwire.CmdFlagFUA
	}
	if f&blk.MayUnmap == 0 {
		q.Flags |= nbdwire.CmdFlagNoHole
	}
	if f&blk.NoFallback != 0 {
		q.Flags |= nbdwire.CmdFlagFastZero
	}
	_, err := d.link.do(r, q, body{})
	return err
}

// Discard implements graph.Discarder.
func (d *disk) Discard(r *blk.Req, off, n int64) error {
	if !d.e.has(nbdwire.FlagTrim) {
		return blk.ErrNotSupported
	}
	if n = d.inside(off, n); n == 0 {
		return nil
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdTrim, Off: uint64(off), Len: uint64(n)}
	_, err := d.link.do(r, q, body{})
	return err
}

// Flush implements graph.Flusher. A server that takes no flush has nothing to flush.
func (d *disk) Flush(r *blk.Req) error {
	if !d.e.has(nbdwire.FlagFlush) {
		return nil
	}
	_, err := d.link.do(r, nbdwire.Request{Cmd: nbdwire.CmdFlush}, body{})
	return err
}

// Status implements graph.BlockStatuser.
func (d *disk) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	k := d.inside(off, n)
	switch {
	case k == 0:
		return blk.Extent{N: n, Zero: true}, nil
	case !d.e.status:
		return blk.Extent{N: n, Data: true, OffValid: true, MapOff: off}, nil
	}
	align := d.e.limits().RequestAlign
	if !d.e.extended {
		k = min(k, blk.AlignDown(math.MaxInt32, align))
	}
	q := nbdwire.Request{
		Cmd: nbdwire.CmdBlockStatus, Flags: nbdwire.CmdFlagReqOne, Off: uint64(off), Len: uint64(k),
	}
	x, err := d.link.do(r, q, body{})
	if err != nil {
		return blk.Extent{}, err
	}
	return d.extent(x, off, k, align), nil
}

// extent is what x, the answer to a question about [off, off+n), says of whole blocks.
func (d *disk) extent(x nbdwire.Extent, off, n, align int64) blk.Extent {
	got := int64(min(x.N, uint64(n)))
	if got < n && got%align != 0 {
		if got < align { // the server tells of less than it reads
			got, x.Flags = min(align, n), 0
		} else {
			got = blk.AlignDown(got, align)
		}
	}
	if d.depth && x.Flags > 2 {
		x.Flags = 2 // any depth is data of a layer below
	}
	return blk.Extent{
		N: got, OffValid: true, MapOff: off,
		Data: x.Flags&nbdwire.StateHole == 0, Zero: x.Flags&nbdwire.StateZero != 0,
	}
}

var errGrow = blk.Text("Cannot grow NBD nodes", syscall.EINVAL)

// Resize implements graph.Resizer: an export has the size that its server gives it, which is enough
// for what is smaller.
func (d *disk) Resize(_ context.Context, size int64, _ blk.Prealloc) error {
	if size > d.size {
		return errGrow
	}
	return nil
}

var _ graph.Driver = (*disk)(nil)
