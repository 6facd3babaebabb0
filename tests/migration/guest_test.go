package migration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/tests/daemon"
	"qblockd/tests/trial"
)

const (
	guests   = 3
	partSize = 10<<20 + 512 // of a guest, in bytes
	diskSize = guests * partSize
	// maxWrite is the longest request.
	maxWrite = 128 << 10
	// answerTime is how long a guest waits for an answer: longer than reconnect-delay.
	answerTime = 90 * time.Second
)

// guest uses its part of the disk, and knows what is there.
type guest struct {
	r     *rand.Rand
	base  int64
	n     *daemon.NBD
	done  atomic.Int64 // requests
	again int          // requests that failed and were made again
	model []byte       // what is there
	// What is there after a crash: each byte of log, which were written since the last flush, may be
	// there or not.
	flushed []byte
	log     []entry
}

// entry is a write.
type entry struct {
	off   int64
	p     []byte
	fixed bool // it was acknowledged, and went to stable storage
}

// connect begins to use an export.
func (g *guest) connect(socket, export string) error {
	n, err := daemon.DialNBDBy(socket, export, time.Time{})
	if err != nil {
		return err
	}
	if g.n != nil {
		g.n.Drop()
	}
	g.n = n
	return nil
}

// try makes a request until it does not fail for the wire, as a machine does that stops at such
// errors and is continued.
func (g *guest) try(f func() error) error {
	g.n.SetDeadline(time.Now().Add(answerTime))
	for i := 0; ; i++ {
		err := f()
		if i == 100 || !errors.Is(err, syscall.EIO) {
			return err
		}
		g.again++
	}
}

// write writes p at off of the part, in one of the ways that there are.
func (g *guest) write(p []byte, off int64) error {
	at, way := g.base+off, g.r.IntN(8)
	f := func() error { return g.n.WriteAt(p, at) }
	switch way {
	case 0:
		f = func() error { return g.n.WriteFUA(p, at) }
	case 1:
		clear(p)
		f = func() error { return g.n.Zero(at, len(p)) }
	case 2:
		clear(p)
		f = func() error { return g.n.ZeroNoHole(at, len(p)) }
	}
	g.log = append(g.log, entry{off: off, p: p})
	if err := g.try(f); err != nil {
		return err
	}
	g.log[len(g.log)-1].fixed = way == 0
	copy(g.model[off:], p)
	return nil
}

// flush has all that was written be on stable storage.
func (g *guest) flush() error {
	if err := g.try(g.n.Flush); err != nil {
		return err
	}
	for _, e := range g.log {
		copy(g.flushed[e.off:], e.p)
	}
	g.log = nil
	return nil
}

// step is one request.
func (g *guest) step() error {
	defer g.done.Add(1)
	n := 1 + g.r.Int64N(maxWrite)
	if trial.One(g.r, 2) {
		n = 1 + g.r.Int64N(4096)
	}
	off := g.r.Int64N(partSize - n + 1)
	switch g.r.IntN(10) {
	case 0:
		return g.flush()
	case 1, 2, 3:
		return g.look(off, n)
	}
	return g.write(randomBytes(g.r, int(n)), off)
}

// look compares a range with what should be there.
func (g *guest) look(off, n int64) error {
	p := make([]byte, n)
	if err := g.try(func() error { return g.n.ReadAt(p, g.base+off) }); err != nil {
		return err
	}
	return trial.Same(p, g.model[off:off+n], int(g.base+off))
}

// chunks does f for all of the part, piece by piece.
func chunks(f func(off, n int64) error) error {
	const step = 1 << 20
	for off := int64(0); off < partSize; off += step {
		if err := f(off, min(step, partSize-off)); err != nil {
			return err
		}
	}
	return nil
}

// lookAll compares the whole part.
func (g *guest) lookAll() error { return chunks(g.look) }

// recover looks at what a crash has left, and goes on with that.
func (g *guest) recover() error {
	err := chunks(func(off, n int64) error {
		p := g.model[off : off+n]
		if err := g.try(func() error { return g.n.ReadAt(p, g.base+off) }); err != nil {
			return err
		}
		for i, b := range p {
			if !g.possible(off+int64(i), b) {
				return fmt.Errorf("%#x at %d, which was never there or is older than the last flush", b, g.base+off+int64(i))
			}
		}
		return nil
	})
	g.log = nil
	copy(g.flushed, g.model)
	return errors.Join(err, g.flush())
}

// possible tells whether a crash may have left b at off.
func (g *guest) possible(off int64, b byte) bool {
	for _, e := range slices.Backward(g.log) {
		if off < e.off || off >= e.off+int64(len(e.p)) {
			continue
		}
		if e.p[off-e.off] == b {
			return true
		}
		if e.fixed {
			return false
		}
	}
	return g.flushed[off] == b
}

func randomBytes(r *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := 0; i < n; i += 8 {
		v := r.Uint64()
		for k := i; k < min(i+8, n); k++ {
			p[k], v = byte(v), v>>8
		}
	}
	return p
}

// party are the guests of a disk.
type party struct {
	all  []*guest
	stop atomic.Bool
	work sync.WaitGroup
	errs [guests]error
}

func newParty(r *rand.Rand) *party {
	p := &party{}
	for i := range guests {
		own := rand.New(rand.NewPCG(r.Uint64(), 1))
		p.all = append(p.all, &guest{r: own, base: int64(i) * partSize,
			model: make([]byte, partSize), flushed: make([]byte, partSize)})
	}
	return p
}

// each does f for all guests at once.
func (p *party) each(f func(g *guest) error) error {
	for i, g := range p.all {
		p.work.Go(func() { p.errs[i] = f(g) })
	}
	p.work.Wait()
	return errors.Join(p.errs[:]...)
}

// connect has all use an export.
func (p *party) connect(socket, export string) error {
	return p.each(func(g *guest) error { return g.connect(socket, export) })
}

// fill writes most of the disk.
func (p *party) fill() error {
	return p.each(func(g *guest) error {
		for off := int64(0); off < partSize; off += 1 << 20 {
			if trial.One(g.r, 4) {
				continue
			}
			b := randomBytes(g.r, int(min(1<<20, partSize-off)))
			if err := g.write(b, off); err != nil {
				return err
			}
		}
		return g.flush()
	})
}

// begin has all write until end.
func (p *party) begin() {
	p.stop.Store(false)
	for i, g := range p.all {
		p.work.Go(func() {
			for p.errs[i] = nil; p.errs[i] == nil && !p.stop.Load(); {
				p.errs[i] = g.step()
			}
		})
	}
}

func (p *party) end() error {
	p.stop.Store(true)
	p.work.Wait()
	return errors.Join(p.errs[:]...)
}

// done is how many requests were answered.
func (p *party) done() (n int64) {
	for _, g := range p.all {
		n += g.done.Load()
	}
	return n
}

// again is how many requests were made again.
func (p *party) again() (n int) {
	for _, g := range p.all {
		n += g.again
	}
	return n
}

// lookAll compares the whole disk.
func (p *party) lookAll() error { return p.each((*guest).lookAll) }
