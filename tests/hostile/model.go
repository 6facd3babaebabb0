package hostile

import (
	"hash/maphash"
	"slices"
)

const sector = 512

// model is what the disk may show, by sector of the probes. A sector that is not there may show
// anything.
type model struct {
	seed    maphash.Seed
	zero    uint64
	may     map[int64][]uint64 // hashes of what sector may be
	written map[int64]bool     // by us since the last flush that succeeded
	touched map[int64]bool     // ever by us
	lost    map[int64]bool     // forgotten: may have been changed by us
}

func newModel() *model {
	m := &model{seed: maphash.MakeSeed(), may: map[int64][]uint64{}, written: map[int64]bool{},
		touched: map[int64]bool{}, lost: map[int64]bool{}}
	m.zero = m.hash(make([]byte, sector))
	return m
}

func (m *model) hash(b []byte) uint64 { return maphash.Bytes(m.seed, b) }

// learn takes what was read as right.
func (m *model) learn(off int64, b []byte) {
	for ; len(b) >= sector; off, b = off+sector, b[sector:] {
		m.may[off/sector] = []uint64{m.hash(b[:sector])}
	}
}

// wrote notes an acknowledged write.
func (m *model) wrote(off int64, b []byte) {
	m.learn(off, b)
	for s := off / sector; s < (off+int64(len(b)))/sector; s++ {
		m.written[s], m.touched[s] = true, true
	}
}

// each calls f for the sectors of a range that the model knows.
func (m *model) each(off, n int64, f func(s int64)) {
	if n/sector < int64(len(m.may)) {
		for s := off / sector; s < (off+n)/sector; s++ {
			f(s)
		}
		return
	}
	for s := range m.may {
		if s*sector >= off && s*sector < off+n {
			f(s)
		}
	}
}

// zeroed notes acknowledged zeroes; with loose, what was there before may be there still.
func (m *model) zeroed(off, n int64, loose bool) {
	m.each(off, n, func(s int64) {
		old, known := m.may[s]
		m.written[s], m.touched[s] = true, true
		switch {
		case !loose:
			m.may[s] = []uint64{m.zero}
		case known && !slices.Contains(old, m.zero):
			m.may[s] = append(slices.Clone(old), m.zero)
		}
	})
}

// forget makes a range unknown.
func (m *model) forget(off, n int64) {
	m.each(off, n, func(s int64) {
		delete(m.may, s)
		m.lost[s] = true
	})
}

// flushed: everything acknowledged is to be there from now on.
func (m *model) flushed() { clear(m.written) }

// unflushed forgets what need not have reached the disk.
func (m *model) unflushed() {
	for s := range m.written {
		delete(m.may, s)
	}
	clear(m.written)
}

// wrong returns the first sector of b that shows what it must not, or -1.
func (m *model) wrong(off int64, b []byte, ignore func(off int64) bool) int64 {
	for ; len(b) >= sector; off, b = off+sector, b[sector:] {
		may, known := m.may[off/sector]
		if known && !slices.Contains(may, m.hash(b[:sector])) && !ignore(off) {
			return off
		}
	}
	return -1
}
