package qcow2

import (
	"maps"
	"slices"
)

// tally counts references to clusters, and which of them suppose that they are the only one. Its
// pages are small: what it takes is bounded by the number of references, wherever they point, and
// is 1.4 bytes a cluster where many lie side by side. The methods that only read take nil as empty.
type tally struct {
	pages map[int64]*tallyPage
	last  *tallyPage // the page used last, number at
	at    int64
	big   map[int64]uint64 // counts from tallyBig on
}

type tallyPage [1 << tallyBits]uint8

const (
	tallyBits = 7
	tallySole = 1 << 7        // somebody supposes to be the only one
	tallyBig  = tallySole - 1 // the count is in big
	// tallyPageBytes is about what a page takes with its place in the map.
	tallyPageBytes = 1<<tallyBits + 48
)

func newTally() tally { return tally{pages: map[int64]*tallyPage{}} }

func (t *tally) page(c int64, make bool) *tallyPage {
	if t == nil {
		return nil
	}
	k := c >> tallyBits
	if t.last != nil && t.at == k {
		return t.last
	}
	p := t.pages[k]
	if p == nil {
		if !make {
			return nil
		}
		p = new(tallyPage)
		t.pages[k] = p
	}
	t.last, t.at = p, k
	return p
}

func slot(c int64) int64 { return c & (1<<tallyBits - 1) }

// get is the number of references to cluster c.
func (t *tally) get(c int64) uint64 {
	p := t.page(c, false)
	if p == nil {
		return 0
	}
	if n := p[slot(c)] &^ tallySole; n < tallyBig {
		return uint64(n)
	}
	return t.big[c]
}

// torn tells whether c has several references, one of which supposes to be the only one.
func (t *tally) torn(c int64) bool {
	p := t.page(c, false)
	return p != nil && p[slot(c)]&tallySole != 0 && p[slot(c)]&^tallySole > 1
}

// add counts n references more to cluster c; sole: they suppose to be the only one.
func (t *tally) add(c int64, n uint64, sole bool) {
	v := &t.page(c, true)[slot(c)]
	if sole {
		*v |= tallySole
	}
	t.set(v, c, t.get(c)+n)
}

// take takes one reference to c back.
func (t *tally) take(c int64) {
	if n := t.get(c); n > 0 {
		t.set(&t.page(c, true)[slot(c)], c, n-1)
	}
}

func (t *tally) set(v *uint8, c int64, n uint64) {
	if n < tallyBig {
		*v = *v&tallySole | uint8(n)
		return
	}
	*v |= tallyBig
	if t.big == nil {
		t.big = map[int64]uint64{}
	}
	t.big[c] = n
}

// order lists the numbers of the pages there are, in order.
func (t *tally) order() []int64 { return slices.Sorted(maps.Keys(t.pages)) }

// bytes is about what the tally takes.
func (t *tally) bytes() int64 { return int64(len(t.pages))*tallyPageBytes + int64(len(t.big))*48 }
