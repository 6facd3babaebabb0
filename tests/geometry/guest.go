package geometry

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// guest writes to a part of the disk of its own.
type guest struct {
	w      *world
	root   *graph.Root
	lo     int64
	data   []byte // of its part
	r      *rand.Rand
	faulty bool

	over chan struct{}
	done sync.WaitGroup
	err  error
	must []span // written or zeroed for certain
	may  []span // or perhaps
}

// start lets a guest write to [lo, hi) until stop is called.
func (w *world) start(node string, lo, hi int64, seed uint64) (*guest, error) {
	root, err := w.attach(node, false)
	if err != nil {
		return nil, err
	}
	return &guest{w: w, root: root, lo: lo, data: w.data[lo:hi], r: rand.New(rand.NewPCG(w.Seed, seed)), over: make(chan struct{})}, nil
}

// run begins to write, at least a few times.
func (g *guest) run() {
	g.done.Go(func() {
		for i := 0; ; i++ {
			if i >= 3 || !g.w.Busy && i >= 60 {
				select {
				case <-g.over:
					return
				default:
				}
				if !g.w.Busy && i >= 60 {
					<-g.over
					return
				}
			}
			if g.err = g.step(); g.err != nil {
				return
			}
		}
	})
}

// stop waits for the end of what it does.
func (g *guest) stop() error {
	select {
	case <-g.over:
	default:
		close(g.over)
	}
	g.done.Wait()
	return g.err
}

func (g *guest) step() error {
	at, n := g.w.place(g.r, g.lo, int64(len(g.data)))
	if g.w.Busy && len(g.data) > 0 {
		n = min(1<<20, int64(len(g.data)))
		at = g.r.Int64N((int64(len(g.data))-n)/512+1) * 512
	}
	if n == 0 {
		return nil
	}
	off, p := g.lo+at, g.data[at:at+n]
	disk := g.w.space.disk(off)
	switch k := g.r.IntN(10); {
	case k == 0 && !g.w.Busy:
		return g.change(off, p, make([]byte, n), false, func(r *blk.Req) error { return g.root.Discard(r, disk, n) })
	case k == 1:
		f := pick(g.r, 0, blk.MayUnmap)
		return g.change(off, p, make([]byte, n), true, func(r *blk.Req) error { return g.root.Zero(r, disk, n, f) })
	case k == 2 && !g.w.Busy:
		return g.look(off, p)
	case k == 3:
		if err := g.w.unit(g.root, g.root.Flush); err != nil && !g.faulty {
			return fmt.Errorf("a guest's flush fails: %w", err)
		}
		return nil
	default:
		q := make([]byte, n)
		if g.w.Busy {
			copy(q, bytes.Repeat([]byte{byte(g.r.Uint32())}, int(n)))
		} else {
			write(g.r, q)
		}
		return g.change(off, p, q, true, func(r *blk.Req) error { return g.root.WriteAt(r, blk.Buf(q), disk, 0) })
	}
}

// change makes p, at off, become q, or if it is not sure, each byte what it was or what it is in q.
func (g *guest) change(off int64, p, q []byte, sure bool, f func(r *blk.Req) error) error {
	err := g.w.unit(g.root, f)
	if err != nil && !g.faulty {
		return fmt.Errorf("a guest's request at %d+%d fails: %w", off, len(p), err)
	}
	g.may = append(g.may, span{off, int64(len(p))})
	if err == nil && sure {
		g.must = append(g.must, span{off, int64(len(p))})
		copy(p, q)
		return nil
	}
	got, err := g.read(off, len(p))
	if err != nil {
		return err
	}
	for i := range got {
		if got[i] != p[i] && got[i] != q[i] {
			return fmt.Errorf("byte %d is %#x, was %#x", off+int64(i), got[i], p[i])
		}
	}
	copy(p, got)
	return nil
}

func (g *guest) read(off int64, n int) ([]byte, error) {
	p := make([]byte, n)
	for try := 0; ; try++ {
		err := g.w.unit(g.root, func(r *blk.Req) error { return g.root.ReadAt(r, blk.Buf(p), g.w.space.disk(off), 0) })
		if err == nil || !g.faulty || try == 3 {
			return p, err
		}
		if try == 2 {
			g.w.clear() // what fails for ever fails no more
		}
	}
}

func (g *guest) look(off int64, p []byte) error {
	got, err := g.read(off, len(p))
	if err != nil {
		return err
	}
	if err := same(fmt.Sprintf("what a guest reads at %d", off), got, p); err != nil {
		return err
	}
	return nil
}
