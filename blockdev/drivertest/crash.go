package drivertest

import (
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
)

var errNoSpace error = syscall.ENOSPC

const crashSector = 512

// CrashFile is a MemFile that remembers what a power failure could lose. Per sector of 512 bytes
// the medium may hold what it held at the last flush or any state it had since; sectors are
// independent of each other, so writes are forgotten, torn and reordered. FUA writes are on the
// medium at once. The size is treated alike.
type CrashFile struct{ *MemFile }

// version is a state of a sector after write seq.
type version struct {
	seq  int
	data *[crashSector]byte // nil: zeroes
}

type sizeVersion struct {
	seq  int
	size int64
}

// recorder holds what is not yet on the medium. Guarded by MemFile.mu; a nil recorder records
// nothing.
type recorder struct {
	seq     int
	pending map[int64][]version          // by sector, oldest first
	durable map[int64]*[crashSector]byte // state at the last flush of the sectors in pending
	sizes   []sizeVersion                // since the last flush, oldest first
	size    int64                        // at the last flush
	high    int64                        // no byte from here on was ever written
	after   func(i int)
}

// NewCrashFile is a file of size zero bytes, all of it on the medium.
func NewCrashFile(size int64) *CrashFile { return CrashFileOf(NewMemFile(size)) }

// CrashFileOf makes m, with what it holds as the state of the medium, a CrashFile.
func CrashFileOf(m *MemFile) *CrashFile {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rec = &recorder{
		pending: map[int64][]version{}, durable: map[int64]*[crashSector]byte{}, size: m.size.Load(), high: m.size.Load(),
	}
	return &CrashFile{m}
}

// After sets a function that is called after each write, zero, discard, resize and flush,
// with its number from 1. It is called with the file locked: it may do nothing with the file
// but note the moment, or call CrashLocked.
func (c *CrashFile) After(f func(i int)) {
	c.mu.Lock()
	c.rec.after = f
	c.mu.Unlock()
}

// Ops is the number of writes, zeroes, discards, resizes and flushes so far.
func (c *CrashFile) Ops() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.rec.seq
}

// Pending is the number of sectors that a crash could lose.
func (c *CrashFile) Pending() int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(c.rec.pending)
}

// Crash is what a power failure at this moment may leave, drawn by seed: mostly sectors
// survive independently; one seed in four lets whole writes survive or not, one in eight
// cuts the ordered sequence of writes, one in eight loses all. c itself goes on unharmed.
func (c *CrashFile) Crash(seed uint64) *MemFile {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.CrashLocked(seed)
}

// CrashLocked is Crash for the function given to After.
func (c *CrashFile) CrashLocked(seed uint64) *MemFile {
	rng := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))
	r := c.rec
	switch mode := rng.IntN(8); {
	case mode == 0:
		return c.survivors(func(int) bool { return false }, nil)
	case mode == 1:
		cut := rng.IntN(r.seq + 1)
		return c.survivors(func(seq int) bool { return seq <= cut }, nil)
	case mode <= 3:
		lives := map[int]bool{}
		return c.survivors(func(seq int) bool {
			l, ok := lives[seq]
			if !ok {
				l = rng.IntN(2) == 0
				lives[seq] = l
			}
			return l
		}, nil)
	default:
		return c.survivors(nil, rng)
	}
}

// Durable is what a power failure leaves at worst: nothing that was not flushed.
func (c *CrashFile) Durable() *MemFile {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.survivors(func(int) bool { return false }, nil)
}

// Kill is what a killed process leaves: all that was written.
func (c *CrashFile) Kill() *MemFile { return c.Clone() }

// survivors builds the medium: of each sector the latest version whose write lives, or with
// rng any of its versions.
func (c *CrashFile) survivors(lives func(seq int) bool, rng *rand.Rand) *MemFile {
	r := c.rec
	m := c.cloneLocked()
	size := r.size
	if rng != nil {
		if k := rng.IntN(len(r.sizes) + 1); k > 0 {
			size = r.sizes[k-1].size
		}
	}
	for _, v := range r.sizes {
		if lives != nil && lives(v.seq) {
			size = v.size
		}
	}
	// Sectors are visited in order, so that a seed gives the same medium each time.
	for _, s := range slices.Sorted(maps.Keys(r.pending)) {
		vs := r.pending[s]
		data := r.durable[s]
		if rng != nil {
			if k := rng.IntN(len(vs) + 1); k > 0 {
				data = vs[k-1].data
			}
		} else {
			for _, v := range vs {
				if lives(v.seq) {
					data = v.data
				}
			}
		}
		if data == nil {
			m.punch(s*crashSector, crashSector)
		} else {
			m.put(s*crashSector, data[:])
		}
	}
	// Cut first at the end that writes may have had, then bring to size.
	m.size.Store(max(m.size.Load(), size))
	m.setSize(size)
	return m
}

// sector copies the sector's present state. m.mu is held.
func (m *MemFile) sector(s int64) *[crashSector]byte {
	if m.pages[s*crashSector/pageSize] == nil {
		return nil
	}
	d := new([crashSector]byte)
	m.get(s*crashSector, d[:])
	return d
}

// before notes what the medium holds of [off, off+n), which is about to change. m.mu is held.
func (r *recorder) before(m *MemFile, off, n int64) {
	if r == nil {
		return
	}
	note := func(s int64) {
		if len(r.pending[s]) == 0 {
			r.durable[s] = m.sector(s)
		}
	}
	n = min(off+n, r.high) - off
	if n/pageSize <= sparse*int64(len(m.pages)+1) {
		for s := off / crashSector; s*crashSector < off+n; s++ {
			note(s)
		}
		return
	}
	// Of a huge range only what is there: the rest was zeroes and becomes zeroes.
	for i := range m.pages {
		for k := range int64(pageSize / crashSector) {
			if s := i*(pageSize/crashSector) + k; s*crashSector < off+n && (s+1)*crashSector > off {
				note(s)
			}
		}
	}
}

// sparse is by how much a range has to be longer than what is there to be huge.
const sparse = 64

// wrote is called after [off, off+n) was written (data) or became zeroes. m.mu is held.
func (r *recorder) wrote(m *MemFile, off, n int64, data, fua bool) {
	if r == nil {
		return
	}
	r.seq++
	if data {
		r.high = max(r.high, off+n)
	}
	r.note(m, off, n, data, fua)
	r.noteSize(m, fua)
	r.did()
}

func (r *recorder) note(m *MemFile, off, n int64, data, fua bool) {
	note := func(s int64) {
		if fua {
			delete(r.pending, s)
			delete(r.durable, s)
			return
		}
		r.pending[s] = append(r.pending[s], version{r.seq, m.sector(s)})
	}
	n = min(off+n, r.high) - off
	if data || n/crashSector <= sparse*int64(len(r.durable)+1) {
		for s := off / crashSector; s*crashSector < off+n; s++ {
			note(s)
		}
		return
	}
	for s := range r.durable { // before has put there what changes, and pending is part of it
		if s*crashSector < off+n && (s+1)*crashSector > off {
			note(s)
		}
	}
}

func (r *recorder) noteSize(m *MemFile, fua bool) {
	now := m.size.Load()
	switch {
	case fua:
		r.size, r.sizes = now, nil
	case len(r.sizes) > 0 && r.sizes[len(r.sizes)-1].size == now, len(r.sizes) == 0 && r.size == now:
	default:
		r.sizes = append(r.sizes, sizeVersion{r.seq, now})
	}
}

// flushed is called by a flush: all that was written is on the medium. m.mu is held.
func (r *recorder) flushed(m *MemFile) {
	if r == nil {
		return
	}
	r.seq++
	clear(r.pending)
	clear(r.durable)
	r.size, r.sizes = m.size.Load(), nil
	r.did()
}

// resized is called after a change of size. m.mu is held.
func (r *recorder) resized(m *MemFile, old, size int64) {
	if r == nil {
		return
	}
	r.seq++
	if size < old {
		r.note(m, size, old-size, false, false)
	}
	r.noteSize(m, false)
	r.did()
}

func (r *recorder) did() {
	if r.after != nil {
		r.after(r.seq)
	}
}
