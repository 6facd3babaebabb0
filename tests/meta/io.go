package meta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/trial"
)

// span is where an operation works: away from a background's part.
func (m *image) span(r *rand.Rand) (off, n int) {
	size := len(m.data)
	off = r.IntN(size)
	n = 1 + r.IntN(min(size, trial.Pick(r, 512, 4096, 4*m.shape.cs, 256<<10)))
	if r.IntN(3) != 0 { // most guests know sectors
		off, n = off/512*512, (n+511)/512*512
	}
	n = min(n, size-off)
	if b := m.bg; b.overlaps(off, n) {
		off %= b.lo
		n = min(n, b.lo-off)
	}
	return off, n
}

// fill makes content: random, repeating, or zeroes in part.
func fill(r *rand.Rand, p []byte) {
	switch r.IntN(8) {
	case 0:
		clear(p)
		return
	case 1:
		k := byte(1 + r.IntN(255))
		for i := range p {
			p[i] = k
		}
	default:
		var b [8]byte
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(b[:], r.Uint64())
			copy(p[i:], b[:])
		}
	}
	if r.IntN(4) == 0 {
		a := r.IntN(len(p))
		clear(p[a:min(len(p), a+4096)])
	}
}

func (o *op) write(m *image) {
	if !o.writable(m) {
		return
	}
	off, n := m.span(o.r)
	p := make([]byte, n)
	fill(o.r, p)
	fua := o.r.IntN(6) == 0
	o.did("write %s %d+%d fua %v", m.name(), off, n, fua)
	trial.Must(m.guest.write(p, int64(off), fua))
	copy(m.data[off:], p)
}

func (o *op) zero(m *image) {
	if !o.writable(m) {
		return
	}
	off, n := m.span(o.r)
	unmap := o.r.IntN(2) == 0
	o.did("zero %s %d+%d unmap %v", m.name(), off, n, unmap)
	trial.Must(m.guest.zero(int64(off), n, unmap))
	clear(m.data[off : off+n])
}

// discard leaves each byte as it was or zero.
func (o *op) discard(m *image) {
	if !o.writable(m) {
		return
	}
	off, n := m.span(o.r)
	o.did("discard %s %d+%d", m.name(), off, n)
	trial.Must(discard(m.guest, m.data[off:off+n], int64(off)))
}

// discard discards the range of data and takes over what became of it.
func discard(g guest, data []byte, off int64) error {
	if err := g.discard(off, len(data)); err != nil {
		return err
	}
	got := make([]byte, len(data))
	if err := g.read(got, off); err != nil {
		return err
	}
	for i := range got {
		if got[i] != data[i] && got[i] != 0 {
			return fmt.Errorf("discarded byte %d is %#x, was %#x", off+int64(i), got[i], data[i])
		}
	}
	copy(data, got)
	return nil
}

func (o *op) read(m *image) {
	if m.guest == nil {
		return
	}
	off, n := m.span(o.r)
	o.did("read %s %d+%d", m.name(), off, n)
	p := bytes.Repeat([]byte{0xa5}, n)
	trial.Must(m.guest.read(p, int64(off)))
	trial.Must(trial.Same(p, m.data[off:off+n], off))
}

func (w *world) flush(m *image) {
	if m.guest == nil {
		return
	}
	w.did("flush %s", m.name())
	trial.Must(m.guest.flush())
}

// compress writes a whole cluster compressed, as a backup tool does.
func (o *op) compress(m *image) {
	g, ok := m.guest.(*rootGuest)
	if !ok || !o.writable(m) || m.format != types.BlockdevDriverQcow2 {
		return
	}
	off, _ := m.span(o.r)
	off = off / m.shape.cs * m.shape.cs
	n := min(m.shape.cs, len(m.data)-off)
	if m.bg.overlaps(off, n) {
		return
	}
	p := bytes.Repeat([]byte{byte(o.r.Uint32()), byte(o.r.Uint32())}, (n+1)/2)[:n]
	fill(o.r, p[:1+o.r.IntN(n)])
	err := g.compressed(p, int64(off))
	o.did("compress %s %d+%d: %v", m.name(), off, n, err)
	if err == nil {
		copy(m.data[off:], p)
		return
	}
	if !isIO(err) {
		trial.Must(err)
	}
	// It has data of its own; they are unchanged.
	trial.Must(g.read(p, int64(off)))
	trial.Must(trial.Same(p, m.data[off:off+n], off))
}

func (o *op) status(m *image) {
	g, ok := m.guest.(*rootGuest)
	if !ok {
		return
	}
	off, n := m.span(o.r)
	var x blk.Extent
	err := g.do(func(r *blk.Req) (err error) {
		x, err = g.root.StatusAbove(r, nil, false, int64(off), int64(n))
		return err
	})
	o.did("status %s %d+%d: %+v", m.name(), off, n, x)
	trial.Must(err)
	if x.N < 1 || x.N > int64(n) {
		trial.Fail("%d bytes", x.N)
	}
	if x.Zero && !blk.IsZero(m.data[off:off+int(x.N)]) {
		trial.Fail("claims zeroes: %+v", x)
	}
}

// verify compares all of an image.
func (w *world) verify(m *image) {
	if m.closed {
		return
	}
	w.joined(m)
	w.did("verify %s", m.name())
	look := func(g guest) {
		p := make([]byte, len(m.data))
		trial.Must(g.read(p, 0))
		trial.Must(trial.Same(p, m.data, 0))
	}
	if m.guest != nil {
		look(m.guest)
	} else {
		w.reading(w.node(m), look)
	}
}

// burst lets several goroutines work on parts of an image that share blocks and clusters at their
// ends.
func (o *op) burst(m *image) {
	if !o.writable(m) {
		return
	}
	o.joined(m)
	const workers = 4
	o.did("burst %s", m.name())
	var cuts [workers + 1]int
	for i := 1; i < workers; i++ {
		cuts[i] = len(m.data)*i/workers + o.r.IntN(600)
	}
	cuts[workers] = len(m.data)
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for i := range workers {
		p := m.data[cuts[i]:cuts[i+1]]
		seed := o.r.Uint64()
		wg.Go(func() { errs[i] = play(m.guest, p, cuts[i], 8, m.shape.cs, seed) })
	}
	wg.Wait()
	trial.Must(errors.Join(errs...))
}

// play does random I/O on the bytes at lo that data mirrors, which nobody else writes to.
func play(of guest, data []byte, lo, steps, cs int, seed uint64) error {
	g, err := of.another()
	if err != nil {
		return err
	}
	defer g.close()
	r := rand.New(rand.NewPCG(seed, 1))
	for range steps {
		off := r.IntN(len(data))
		n := min(1+r.IntN(trial.Pick(r, 512, 8192, 2*cs)), len(data)-off)
		part := data[off : off+n]
		at := int64(lo + off)
		var err error
		switch r.IntN(8) {
		case 0, 1, 2:
			p := make([]byte, n)
			fill(r, p)
			copy(part, p)
			err = g.write(p, at, r.IntN(8) == 0)
		case 3:
			clear(part)
			err = g.zero(at, n, r.IntN(2) == 0)
		case 4:
			err = discard(g, part, at)
		case 5:
			err = g.flush()
		default:
			p := make([]byte, n)
			if err = g.read(p, at); err == nil {
				err = trial.Same(p, part, lo+off)
			}
		}
		if err != nil {
			return fmt.Errorf("in parallel, %d+%d: %w", at, n, err)
		}
	}
	return nil
}

// background is I/O on a part of an image that goes on while other operations come.
type background struct {
	lo, hi int
	data   []byte // of [lo, hi)
	done   chan error
}

// overlaps tells whether a range has some of what b works on; nil does not.
func (b *background) overlaps(off, n int) bool {
	return b != nil && blk.Overlap(int64(off), int64(n), int64(b.lo), int64(b.hi-b.lo))
}

func (o *op) start(m *image) {
	if !o.writable(m) || m.bg != nil {
		return
	}
	size := len(m.data)
	b := &background{lo: size/4 + int(o.B%512), hi: size * 3 / 4, done: make(chan error, 1)}
	b.data = bytes.Clone(m.data[b.lo:b.hi])
	m.bg = b
	o.did("start background on %s %d+%d", m.name(), b.lo, len(b.data))
	g, seed := m.guest, uint64(o.A)
	go func() { b.done <- play(g, b.data, b.lo, 20+int(o.C%200), m.shape.cs, seed) }()
}

// joined waits for the background of m to end.
func (w *world) joined(m *image) {
	b := m.bg
	if b == nil {
		return
	}
	m.bg = nil
	w.did("join background of %s", m.name())
	err := <-b.done
	copy(m.data[b.lo:b.hi], b.data)
	trial.Must(err)
}
