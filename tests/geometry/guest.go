package geometry

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/tests/trial"
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
	r := rand.New(rand.NewPCG(w.Seed, seed))
	return &guest{w: w, root: root, lo: lo, data: w.data[lo:hi], r: r, over: make(chan struct{})}, nil
}

type guests []*guest

func (l guests) stop() (err error) {
	for _, g := range l {
		err = errors.Join(err, g.stop())
	}
	return err
}

// leave detaches them.
func (l guests) leave() (err error) {
	for _, g := range l {
		err = errors.Join(err, g.w.x.Graph.CloseRoot(g.w.ctx, g.root))
	}
	return err
}

// run begins to write, at least a few times.
func (g *guest) run() {
	g.done.Go(func() {
		g.err = trial.Run(func() {
			for i := 0; !g.ends(i); i++ {
				g.step()
			}
		})
	})
}

// ends tells whether a guest that has made i steps has made enough, and waits until it is to end if
// so.
func (g *guest) ends(i int) bool {
	if !g.w.Busy && i >= 60 {
		<-g.over
	}
	select {
	case <-g.over:
		return i >= 3
	default:
		return false
	}
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

func (g *guest) step() {
	at, n := g.w.space.place(g.r, g.lo, int64(len(g.data)))
	if g.w.Busy && len(g.data) > 0 {
		n = min(1<<20, int64(len(g.data)))
		at = g.r.Int64N((int64(len(g.data))-n)/512+1) * 512
	}
	if n == 0 {
		return
	}
	off, p, q := g.lo+at, g.data[at:at+n], make([]byte, n)
	disk := g.w.space.disk(off)
	switch k := g.r.IntN(10); {
	case k == 0 && !g.w.Busy:
		g.change(off, p, q, false, func(r *blk.Req) error { return g.root.Discard(r, disk, n) })
	case k == 1:
		f := trial.Pick(g.r, 0, blk.MayUnmap)
		g.change(off, p, q, true, func(r *blk.Req) error { return g.root.Zero(r, disk, n, f) })
	case k == 2 && !g.w.Busy:
		same(fmt.Sprintf("what a guest reads at %d", off), g.read(off, len(p)), p)
	case k == 3:
		if err := g.w.unit(g.root, g.root.Flush); err != nil && !g.faulty {
			trial.Fail("a guest's flush fails: %w", err)
		}
	default:
		if g.w.Busy {
			copy(q, bytes.Repeat([]byte{byte(g.r.Uint32())}, int(n)))
		} else {
			write(g.r, q)
		}
		g.change(off, p, q, true, func(r *blk.Req) error { return g.root.WriteAt(r, blk.Buf(q), disk, 0) })
	}
}

// change makes p, at off, become q, or if it is not sure, each byte what it was or what it is in q.
func (g *guest) change(off int64, p, q []byte, sure bool, f func(r *blk.Req) error) {
	err := g.w.unit(g.root, f)
	if err != nil && !g.faulty {
		trial.Fail("a guest's request at %d+%d fails: %w", off, len(p), err)
	}
	g.may = append(g.may, span{off, int64(len(p))})
	if err == nil && sure {
		g.must = append(g.must, span{off, int64(len(p))})
		copy(p, q)
		return
	}
	got := g.read(off, len(p))
	for i := range got {
		if got[i] != p[i] && got[i] != q[i] {
			trial.Fail("byte %d is %#x, was %#x", off+int64(i), got[i], p[i])
		}
	}
	copy(p, got)
}

func (g *guest) read(off int64, n int) []byte {
	p := make([]byte, n)
	for try := 0; ; try++ {
		err := g.w.unit(g.root, func(r *blk.Req) error {
			return g.root.ReadAt(r, blk.Buf(p), g.w.space.disk(off), 0)
		})
		switch {
		case err == nil:
			return p
		case !g.faulty || try == 3:
			trial.Must(err)
		case try == 2:
			g.w.clear() // what fails for ever fails no more
		}
	}
}
