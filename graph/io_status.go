package graph

import (
	"sync/atomic"

	"qblockd/graph/blk"
)

// dataCache remembers the last range that a node without children reported as data: asking for the
// status of a file is slow on some file systems. Zeroing and discarding drop it; it may miss
// nothing else, for to report zeroes as data is allowed.
type dataCache struct {
	p atomic.Pointer[dataRange]
}

type dataRange struct{ off, end int64 }

func (c *dataCache) drop() { c.p.Store(nil) }

// dropRange drops the cache if it overlaps [off, off+n).
func (c *dataCache) dropRange(off, n int64) {
	if d := c.p.Load(); d != nil && off < d.end && off+n > d.off {
		c.p.Store(nil)
	}
}

// known is the number of bytes from off on that are known to be data.
func (c *dataCache) known(off int64) int64 {
	if d := c.p.Load(); d != nil && off >= d.off && off < d.end {
		return d.end - off
	}
	return 0
}

func (c *dataCache) fill(off, n int64) {
	const worthIt = 1 << 20 // smaller ranges are not worth an allocation
	if n >= worthIt {
		c.p.Store(&dataRange{off, off + n})
	}
}

// Status tells what is known of a prefix of [off, off+size) in this layer alone: blk.Extent. Zero
// beyond what the driver says: where nothing is allocated and there is no backing node, or none so
// long. Offsets refer to Extent.In; for nil that is the node's own host file. At or beyond the end:
// N 0 and EOF, no error. Errors: blk.ErrOutOfRange (negative), those of the driver.
func (e *Edge) Status(r *blk.Req, off, size int64) (blk.Extent, error) {
	if !blk.ValidRange(off, size) {
		return blk.Extent{}, blk.ErrOutOfRange
	}
	return e.node.Load().io.statusOf(r, off, size)
}

// Status is Edge.Status for those who have only the node: a driver or job inside a request
// that entered through it.
func (s *IO) Status(r *blk.Req, off, size int64) (blk.Extent, error) {
	if !blk.ValidRange(off, size) {
		return blk.Extent{}, blk.ErrOutOfRange
	}
	return s.statusOf(r, off, size)
}

func (s *IO) statusOf(r *blk.Req, off, size int64) (blk.Extent, error) {
	if s.drv.Driver == nil {
		return blk.Extent{}, blk.ErrClosed
	}
	total := s.drv.Size()
	if off >= total {
		return blk.Extent{EOF: true}, nil
	}
	if size = min(size, total-off); size == 0 {
		return blk.Extent{}, nil
	}
	sh := s.track.shard(r)
	sh.inFlight.Add(1)
	x, err := s.driverStatus(r, off, size)
	sh.inFlight.Add(-1)
	if err != nil {
		return blk.Extent{}, err
	}
	x.EOF = off+x.N == total
	return x, nil
}

// driverStatus asks the driver about whole blocks, cuts the answer to what was asked and completes
// it.
func (s *IO) driverStatus(r *blk.Req, off, size int64) (blk.Extent, error) {
	k := s.n.kids.Load()
	if s.drv.status == nil {
		if s.n.Kind() == Filter && k.filtered != nil {
			return s.statusBelow(r, k.filtered, off, size)
		}
		return blk.Extent{N: size, Data: true, Allocated: true, OffValid: s.n.Kind() == Protocol, MapOff: off}, nil
	}
	leaf := len(k.all) == 0
	if leaf {
		if d := s.statusData.known(off); d > 0 {
			return blk.Extent{N: min(size, d), Data: true, Allocated: true, OffValid: true, MapOff: off}, nil
		}
	}
	lo := blk.AlignDown(off, s.drv.align)
	asked := blk.AlignUp(off+size, s.drv.align) - lo
	x, err := s.drv.Status(r, lo, asked)
	if err != nil {
		return x, err
	}
	if skip := off - lo; x.N <= skip || x.N > asked || invariantsOn && x.Recurse && (!x.Data || !x.OffValid || x.Zero) {
		panic("graph: status of driver " + s.n.DriverName() + " breaks the rules")
	} else {
		x.N = min(x.N-skip, size)
		if x.OffValid {
			x.MapOff += skip
		}
	}
	if leaf && x.Data && !x.Zero && x.OffValid && x.MapOff == off {
		s.statusData.fill(off, x.N)
	}
	if c, ok := x.In.(*Edge); ok && c != nil && x.Raw {
		return s.statusBelow(r, c, x.MapOff, x.N)
	}
	s.completeStatus(r, k, &x, off)
	return x, nil
}

// statusBelow is the child's answer as one's own.
func (s *IO) statusBelow(r *blk.Req, c *Edge, off, size int64) (blk.Extent, error) {
	x, err := c.node.Load().io.statusOf(r, off, size)
	if err != nil {
		return x, err
	}
	if x.N == 0 {
		// The child is shorter than n says it is: reads give zeroes there.
		return blk.Extent{N: size, Zero: true, Allocated: true}, nil
	}
	if x.In == nil && x.OffValid {
		x.In = c
	}
	if !x.Allocated && !x.Zero && s.n.Kind() != Filter {
		// What the child reads from its own backing chain is content of n, which ends the chain
		// that n is in.
		x.Allocated, x.Data, x.OffValid, x.MapOff, x.In = true, true, false, 0, nil
	}
	return x, nil
}

// completeStatus adds what the driver cannot know: zeroes where nothing lies below, and zeroes
// within the data that the child knows of.
func (s *IO) completeStatus(r *blk.Req, k *kids, x *blk.Extent, off int64) {
	switch {
	case x.Data || x.Zero:
		x.Allocated = true
	case s.drv.caps.Backing:
		if k.backing == nil || off >= k.backing.node.Load().Size() {
			x.Zero = true
		}
	}
	c, _ := x.In.(*Edge)
	if !x.Recurse || c == nil || !x.Data || x.Zero || !x.OffValid {
		return
	}
	x.Recurse = false
	below, err := c.node.Load().io.statusOf(r, x.MapOff, x.N)
	switch {
	case err != nil:
		// Only additional knowledge was asked for.
	case below.EOF && (below.N == 0 || below.Zero):
		x.Zero = true // what lies beyond the child's end reads as zeroes, too
	default:
		x.N = below.N
		x.Zero = below.Zero
	}
}

// StatusAbove tells what a prefix of [off, off+size) holds in the layers from the node below e down
// its chain of filters and backing nodes to base: excluded, or included with includeBase; nil means
// to the end. Depth counts the layers looked into; it is 0 if none of them decides the content
// (Allocated is false then). What a layer reads from beyond the end of the layer below counts as
// zeroes allocated in the latter. EOF refers to the topmost node.
func (e *Edge) StatusAbove(r *blk.Req, base *Node, includeBase bool, off, size int64) (blk.Extent, error) {
	if !blk.ValidRange(off, size) {
		return blk.Extent{}, blk.ErrOutOfRange
	}
	top := e.node.Load()
	if top == base && !includeBase {
		return blk.Extent{N: size}, nil
	}
	x, err := top.io.statusOf(r, off, size)
	if err != nil || x.N == 0 {
		return x, err
	}
	x.Depth = 1
	eof := int64(-1)
	if x.EOF {
		eof = off + x.N
	}
	size = x.N
	for p := top; !x.Allocated && p != base; {
		c := Now.FilterOrCOWChild(p)
		if c == nil || c.node.Load() == base && !includeBase {
			break
		}
		p = c.node.Load()
		depth := x.Depth + 1
		if x, err = p.io.statusOf(r, off, size); err != nil {
			return x, err
		}
		if x.N == 0 {
			x = blk.Extent{N: size, Zero: true, Allocated: true, In: c}
		} else if x.In == nil && x.OffValid {
			x.In = c
		}
		x.Depth, size = depth, x.N
	}
	x.EOF = off+x.N == eof
	if !x.Allocated {
		x.Depth = 0
	}
	return x, nil
}
