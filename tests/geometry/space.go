package geometry

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/tests/trial"
)

// space is where a disk may hold data: in windows, in order and apart from each other. The model
// keeps the windows one behind the other, and what lies between them are zeroes for ever. So a disk
// of a terabyte is as cheap as a small one, of which one window is all.
//
//	disk   [www]......................[www].........[www]
//	model  [www][www][www]
//
// nil is the space in which both are the same.
type space []window

// window is a part of a disk, and where it begins in the model.
type window struct{ off, n, at int64 }

// newSpace has windows of n bytes around places.
func newSpace(places []int64, n, size int64) (s space) {
	slices.Sort(places)
	end, at := int64(0), int64(0)
	for _, p := range places {
		lo := max(blk.AlignDown(max(p-n/2, 0), 512), end)
		hi := min(blk.AlignDown(p+n/2, 512), size)
		if lo >= hi {
			continue
		}
		s = append(s, window{lo, hi - lo, at})
		end, at = hi, at+hi-lo
	}
	return s
}

// model is how much the model has of a disk of some size.
func (s space) model(size int64) int64 {
	if s == nil {
		return size
	}
	n := int64(0)
	for _, w := range s {
		n += min(w.n, max(size-w.off, 0))
	}
	return n
}

// find is the window with a byte of the model.
func (s space) find(at int64) window {
	if s == nil {
		return window{n: 1 << 62}
	}
	i, ok := slices.BinarySearchFunc(s, at, func(w window, at int64) int {
		if at >= w.at && at < w.at+w.n {
			return 0
		}
		return cmp.Compare(w.at, at)
	})
	if !ok {
		panic(fmt.Sprintf("geometry: byte %d of a model of %v", at, s))
	}
	return s[i]
}

// place is a part of [lo, lo+size) of the model that lies in one window.
func (s space) place(r *rand.Rand, lo, size int64) (off, n int64) {
	if off, n = place(r, size); n > 0 {
		n = s.within(lo+off, n)
	}
	return off, n
}

// disk is where a byte of the model is on the disk.
func (s space) disk(at int64) int64 {
	w := s.find(at)
	return w.off + at - w.at
}

// within is how much of n bytes from at on lies in one window.
func (s space) within(at, n int64) int64 {
	w := s.find(at)
	return min(n, w.at+w.n-at)
}

// of are the parts of [off, off+n) of a disk that the model has, by their places in it.
func (s space) of(off, n int64) (l []span) {
	if s == nil {
		return []span{{off, n}}
	}
	for _, w := range s {
		lo, hi := max(off, w.off), min(off+n, w.off+w.n)
		if lo < hi {
			l = append(l, span{w.at + lo - w.off, hi - lo})
		}
	}
	return l
}

// zeroBetween checks that a disk reads as zeroes where the model has nothing. What its node calls
// zeroes is believed, but for some bytes on both sides of each window.
func (w *world) zeroBetween(root *graph.Root) {
	const edge = 4096
	lo, size := int64(0), root.Size()
	for _, v := range append(slices.Clone(w.space), window{off: size}) {
		hi := min(v.off, size)
		for off := lo; off < hi; {
			n := min(hi-off, edge)
			believe := off > lo && hi-off > edge
			if believe {
				n = hi - off - edge
			}
			off += w.zeroes(root, off, n, believe)
		}
		lo = v.off + v.n
	}
}

// zeroes checks a part of [off, off+n), and tells how long it was.
func (w *world) zeroes(root *graph.Root, off, n int64, believe bool) int64 {
	name := root.Node().Name()
	trial.Must(w.unit(root, func(r *blk.Req) error {
		if believe {
			x, err := root.Edge().StatusAbove(r, nil, false, off, n)
			if n = x.N; err != nil || x.Zero {
				return err
			}
		}
		n = min(n, 1<<20)
		p := make([]byte, n)
		if err := root.ReadAt(r, blk.Buf(p), off, 0); err != nil {
			return err
		}
		if !blk.IsZero(p) {
			return fmt.Errorf("%s has data in [%d, +%d), where nobody wrote", name, off, n)
		}
		return nil
	}))
	if n == 0 {
		trial.Fail("%s says nothing of byte %d", name, off)
	}
	return n
}

// setTo makes the bytes of the model in [at, at+n) dirty in a bitmap of the disk.
func (s space) setTo(b *bitmap.Bitmap, at, n int64) {
	for n > 0 {
		k := s.within(at, n)
		b.Set(s.disk(at), k)
		at, n = at+k, n-k
	}
}
