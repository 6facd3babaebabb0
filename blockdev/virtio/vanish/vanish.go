// Package vanish keeps the process alive when memory that it shares with others vanishes: the file
// below a mapping is truncated, or there is no huge page left for it. Whoever touches such a page
// gets SIGBUS, in whatever goroutine, holding whatever locks. In memory that is watched a page of
// zeroes takes its place instead, and the access is repeated: nobody notices but who asks. So reads
// find zeroes and writes go nowhere, which is what is left of memory that has gone.
//
// A handler for SIGBUS, in assembly, stands before the runtime's from the first Watch on, and gives
// what is not its business to that. It is there on linux/amd64; elsewhere Watch does nothing, and
// faults are what the runtime makes of them.
package vanish

import (
	"errors"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Area is memory that is watched.
type Area struct{ e *entry }

// entry is read by the handler, at any time: an end of 0 is no area.
type entry struct {
	start uintptr
	end   atomic.Uintptr
	page  uintptr // bytes that a fault replaces
	gone  atomic.Uintptr
}

// maxAreas is how many there may be at a time; the handler looks at all that were in use once.
const maxAreas = 4096

// What the handler reads. entries are never moved.
var (
	entries [maxAreas]entry
	count   atomic.Uintptr // of entries that were in use once
	faults  atomic.Uint64
)

// Faults is how many pages have been replaced so far, in all areas: while it stays the same no Area
// needs to be asked.
func Faults() uint64 { return faults.Load() }

var areas struct {
	sync.Mutex
	installed bool  // +checklocks:Mutex
	free      []int // +checklocks:Mutex
}

// errAreas: too much is watched.
var errAreas = errors.New("too many areas of shared memory")

// Watch watches b, a mapping of whole pages of that many bytes, a power of two, until End. It must
// not be unmapped before. Error: too many areas, or the handler cannot be set up.
func Watch(b []byte, page int) (*Area, error) {
	areas.Lock()
	defer areas.Unlock()
	if !areas.installed {
		if err := install(); err != nil {
			return nil, err
		}
		areas.installed = true
	}
	n := int(count.Load())
	if k := len(areas.free); k > 0 {
		n = areas.free[k-1]
		areas.free = areas.free[:k-1]
	} else if n == maxAreas {
		return nil, errAreas
	}
	e := &entries[n]
	e.gone.Store(0)
	e.page = uintptr(page)
	e.start = uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	e.end.Store(e.start + uintptr(len(b)))
	if n == int(count.Load()) {
		count.Store(uintptr(n) + 1)
	}
	return &Area{e}, nil
}

// Gone tells whether a page of the area has been replaced.
func (a *Area) Gone() bool { return a.e.gone.Load() != 0 }

// End ends the watch. Nobody touches the memory any more.
func (a *Area) End() {
	areas.Lock()
	defer areas.Unlock()
	a.e.end.Store(0)
	n := (uintptr(unsafe.Pointer(a.e)) - uintptr(unsafe.Pointer(&entries[0]))) / unsafe.Sizeof(entry{})
	areas.free = append(areas.free, int(n))
}
