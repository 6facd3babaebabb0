package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	pageSize = 4096
	// writers is how many operations on pages are under way at a time.
	writers = 8
	// maxRun is how many pages one of them is about.
	maxRun = 32
)

// States of a page besides generations: it is zero, or was discarded and may be anything it was.
const (
	zeroed    = 0
	discarded = 1
	firstGen  = 2
)

// pages writes pages of a partition past the page cache. What a page holds is a function of its
// number and its generation, which is known for each: so each page that is read tells whether it is
// the one that was written last. Each writer has pages of its own.
type pages struct {
	f     *os.File
	n     int64 // pages
	seed  uint64
	meter *meter
	wg    sync.WaitGroup
	gens  []uint32
}

func newPages(dev string, seed uint64, m *meter) (*pages, error) {
	f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	p := &pages{f: f, n: size / pageSize, seed: seed, meter: m}
	p.gens = make([]uint32, p.n)
	// What is on the disk is not known.
	for i := range p.gens {
		p.gens[i] = discarded
	}
	return p, nil
}

// run implements load.
func (p *pages) run() {
	per := p.n / writers
	for w := range int64(writers) {
		p.wg.Go(func() { p.write(w*per, per) })
	}
}

// end implements load.
func (p *pages) end() error {
	p.wg.Wait()
	buf := pageMemory(maxRun * pageSize)
	for at := int64(0); at < p.n; at += maxRun {
		n := min(maxRun, p.n-at)
		if _, err := p.f.ReadAt(buf[:n*pageSize], at*pageSize); err != nil {
			return fmt.Errorf("reading page %d: %w", at, err)
		}
		p.check(at, buf[:n*pageSize])
	}
	return p.f.Close()
}

// write is a writer, of n pages from first on.
func (p *pages) write(first, n int64) {
	rnd := rand.New(rand.NewPCG(p.seed, uint64(first)))
	buf := pageMemory(maxRun * pageSize)
	gen := uint32(firstGen)
	for !p.meter.stopped() {
		k := 1 + rnd.Int64N(maxRun)
		if rnd.IntN(3) > 0 {
			k = 1
		}
		at := first + rnd.Int64N(n-k+1)
		b := buf[:k*pageSize]
		switch x := rnd.IntN(100); {
		case x < 50:
			gen++
			p.put(at, b, gen)
		case x < 85:
			p.meter.time("read", func() error { _, err := p.f.ReadAt(b, at*pageSize); return err })
			if !p.meter.stopped() {
				p.check(at, b)
			}
		case x < 90:
			p.meter.time("flush", p.f.Sync)
		case x < 95:
			p.set(at, k, discarded)
			p.meter.time("discard", func() error { return discard(p.f, at*pageSize, k*pageSize) })
		default:
			p.set(at, k, discarded)
			p.meter.time("zero", func() error { return zeroOut(p.f, at*pageSize, k*pageSize) })
			p.set(at, k, zeroed)
		}
	}
}

// put writes pages of a generation.
func (p *pages) put(at int64, b []byte, gen uint32) {
	for i := range int64(len(b) / pageSize) {
		fill(b[i*pageSize:][:pageSize], p.seed, uint64(at+i), uint64(gen))
	}
	p.meter.time("write", func() error { _, err := p.f.WriteAt(b, at*pageSize); return err })
	p.set(at, int64(len(b)/pageSize), gen)
}

func (p *pages) set(at, n int64, gen uint32) {
	for i := range n {
		p.gens[at+i] = gen
	}
}

// check compares pages with what was written.
func (p *pages) check(at int64, b []byte) {
	want := make([]byte, pageSize)
	for i := range int64(len(b) / pageSize) {
		got := b[i*pageSize:][:pageSize]
		switch gen := p.gens[at+i]; gen {
		case discarded:
			continue
		case zeroed:
			clear(want)
		default:
			fill(want, p.seed, uint64(at+i), uint64(gen))
		}
		for j := range got {
			if got[j] != want[j] {
				p.meter.fault("%v: page %d of generation %d differs at byte %d: it begins %x, should %x",
					time.Now(), at+i, p.gens[at+i], j, got[:24], want[:24])
				break
			}
		}
	}
}

// fill makes a page: its number, its generation, and noise that follows from them.
func fill(b []byte, seed, number, gen uint64) {
	x := seed ^ number<<20 ^ gen
	binary.LittleEndian.PutUint64(b, number)
	binary.LittleEndian.PutUint64(b[8:], gen)
	for i := 16; i < len(b); i += 8 {
		x += 0x9e3779b97f4a7c15 // splitmix64
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b[i:], z^z>>31)
	}
}

// pageMemory is memory that O_DIRECT takes.
func pageMemory(n int) []byte {
	b := make([]byte, n+pageSize)
	off := -uintptr(unsafe.Pointer(&b[0])) % pageSize
	return b[off:][:n:n]
}
