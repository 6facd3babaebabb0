package rebase

import (
	"bytes"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs/copy"
)

// copier copies what differs below the image into it.
type copier struct {
	image *graph.Edge // to it, from the job's filter
	below *graph.Edge // its backing edge
	base  *graph.Edge // to the new backing file; nil: there is to be none
	// shared is the new backing file if it is below the image already, else nil: what no layer
	// above it has is the same in both.
	shared *graph.Node
	grain  int64 // what is compared, and copied, as a whole
}

// look implements copy.Task.Look: what the image has, what both backing files have from the same
// layer, and what reads as zeroes in both needs nothing.
func (c *copier) look(r *blk.Req, off, n int64) (copy.Extent, error) {
	top, err := c.image.Status(r, off, n)
	switch {
	case err != nil:
		return copy.Extent{}, err
	case top.Allocated:
		return copy.Extent{N: top.N}, nil
	}
	old, err := c.below.StatusAbove(r, c.shared, false, off, top.N)
	if err != nil {
		return copy.Extent{}, &graph.CopyError{Err: err}
	}
	if n = top.N; old.N > 0 {
		if n = old.N; !old.Allocated && c.shared != nil {
			return copy.Extent{N: n}, nil
		}
	}
	if c.base != nil {
		base, err := c.base.StatusAbove(r, nil, false, off, n)
		if err != nil {
			return copy.Extent{}, &graph.CopyError{Err: err}
		}
		if base.N > 0 {
			n = base.N
		}
		if !zero(base) {
			return copy.Extent{N: n, Action: copy.Data}, nil
		}
	}
	if zero(old) {
		return copy.Extent{N: n}, nil
	}
	return copy.Extent{N: n, Action: copy.Data}, nil
}

// zero tells whether what no layer has, or one has as zeroes, or lies beyond the end, reads as
// zeroes.
func zero(x blk.Extent) bool { return x.N == 0 || x.Zero || !x.Allocated }

// copy implements copy.Task.Copy. The lock keeps guest writes out; what they wrote before it is
// skipped.
func (c *copier) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	return copy.All(e.N, c.copyAll(r, off, e.N))
}

func (c *copier) copyAll(r *blk.Req, off, n int64) error {
	lock, err := c.image.LockRange(r, off, n)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	for end := off + n; off < end; {
		top, err := c.image.Status(r, off, end-off)
		if err != nil {
			return err
		}
		if !top.Allocated {
			if err := c.compare(r, off, top.N); err != nil {
				return err
			}
		}
		off += top.N
	}
	return nil
}

// compare compares [off, off+n) of the two backing files and writes what differs.
func (c *copier) compare(r *blk.Req, off, n int64) error {
	buf := blk.GetBuf(int(n), c.below.Caps().Limits.MemAlign)
	defer blk.PutBuf(buf)
	if err := read(r, c.below, off, buf.B); err != nil {
		return err
	}
	var now []byte // nil: zeroes
	if c.base != nil {
		b := blk.GetBuf(int(n), c.base.Caps().Limits.MemAlign)
		defer blk.PutBuf(b)
		if now = b.B; len(now) > 0 {
			if err := read(r, c.base, off, now); err != nil {
				return err
			}
		}
	}
	for p := int64(0); p < n; {
		k, same := c.run(buf.B, now, off, p)
		if !same {
			if err := c.write(r, off+p, buf.B[p:p+k]); err != nil {
				return err
			}
		}
		p += k
	}
	return nil
}

// run is the length of the grains from byte p on that are all the same in both, or all are not.
func (c *copier) run(old, now []byte, off, p int64) (n int64, same bool) {
	for end := int64(len(old)); p+n < end; {
		at := p + n
		k := min(c.grain-(off+at)%c.grain, end-at)
		eq := false
		if now == nil {
			eq = blk.IsZero(old[at : at+k])
		} else {
			eq = bytes.Equal(old[at:at+k], now[at:at+k])
		}
		if n > 0 && eq != same {
			break
		}
		n, same = n+k, eq
	}
	return n, same
}

// write has the image have what the old backing file has.
func (c *copier) write(r *blk.Req, off int64, b []byte) (err error) {
	if blk.IsZero(b) {
		err = c.image.Zero(r, off, int64(len(b)), blk.WriteUnchanged)
	} else {
		err = c.image.WriteAt(r, blk.Buf(b), off, blk.WriteUnchanged)
	}
	if err != nil {
		return &graph.CopyError{Write: true, Err: err}
	}
	return nil
}

// read fills b; what lies beyond the end of a backing file reads as zeroes.
func read(r *blk.Req, e *graph.Edge, off int64, b []byte) error {
	n := min(max(e.Size()-off, 0), int64(len(b)))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	if err := e.ReadAt(r, blk.Buf(b[:n]), off, 0); err != nil {
		return &graph.CopyError{Err: err}
	}
	return nil
}
