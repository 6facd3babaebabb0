package types

import "qblockd/schema/value"

// unexpected names the member to complain about when some were not visited. QEMU keeps the
// names of an object in a GLib hash table, takes out those it visits, and complains about the first
// that is left in the table's order. Clients that send several wrong members at once can see that
// order, so the table is played through here. f.order is needed: the table may shrink on the way.
func (f *frame) unexpected() string {
	t := newTable(3)
	f.dict.EachHashed(func(name string, _ value.Value) bool {
		t.insert(name)
		return true
	})
	for _, i := range f.order {
		t.remove(f.dict.Members()[i].Name)
	}
	for _, s := range t.slots {
		if s.state == slotUsed {
			return s.key
		}
	}
	panic("no member is left") // the caller has counted
}

// table has the layout of a GHashTable of strings: open addressing with growing
// steps, removed entries leave a mark, 2^shift slots of which the home slot is a hash
// modulo a prime.
type table struct {
	slots    []slot
	prime    uint32
	occupied int // used and removed slots
	used     int
}

type slot struct {
	state slotState
	hash  uint32
	key   string
}

type slotState uint8

const (
	slotFree slotState = iota
	slotUsed
	slotRemoved
)

// primes are the moduli by shift; larger tables, which no sane request makes, keep the last.
var primes = [...]uint32{1, 2, 3, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521}

func newTable(shift int) *table {
	return &table{slots: make([]slot, 1<<shift), prime: primes[min(shift, len(primes)-1)]}
}

func (t *table) find(key string, hash uint32) (at int, found bool) {
	mask := uint32(len(t.slots) - 1)
	i, removed := hash*11%t.prime, -1
	for step := uint32(1); t.slots[i].state != slotFree; step++ {
		switch s := &t.slots[i]; {
		case s.state == slotRemoved && removed < 0:
			removed = int(i)
		case s.state == slotUsed && s.hash == hash && s.key == key:
			return int(i), true
		}
		i = (i + step) & mask
	}
	if removed >= 0 {
		return removed, false
	}
	return int(i), false
}

func (t *table) insert(key string) {
	hash := tableHash(key)
	i, found := t.find(key, hash)
	if found {
		return
	}
	if t.slots[i].state == slotFree {
		t.occupied++
	}
	t.slots[i] = slot{slotUsed, hash, key}
	t.used++
	t.resize()
}

func (t *table) remove(key string) {
	if i, found := t.find(key, tableHash(key)); found {
		t.slots[i] = slot{state: slotRemoved}
		t.used--
		t.resize()
	}
}

// resize makes room, or gives it back, where GLib does.
func (t *table) resize() {
	size := len(t.slots)
	if !(size > t.used*4 && size > 8 || size <= t.occupied+t.occupied/16) {
		return
	}
	shift := 0
	for n := int(float64(t.used) * 1.333); n > 0; n >>= 1 {
		shift++
	}
	t.rehash(max(shift, 3))
}

// rehash moves all entries to their places in a table of another size, as GLib does it
// in place: an entry that takes a slot not yet moved drives its owner out, which is
// moved next.
func (t *table) rehash(shift int) {
	old := len(t.slots)
	nt := newTable(shift)
	mask := uint32(len(nt.slots) - 1)
	t.slots = append(t.slots, make([]slot, max(0, len(nt.slots)-old))...)
	placed := make([]bool, len(t.slots))
	for i := range old {
		if placed[i] {
			continue
		}
		s := t.slots[i]
		t.slots[i] = slot{}
		for s.state == slotUsed {
			at := s.hash * 11 % nt.prime
			for step := uint32(1); placed[at]; step++ {
				at = (at + step) & mask
			}
			placed[at] = true
			s, t.slots[at] = t.slots[at], s
		}
	}
	t.slots = t.slots[:len(nt.slots)]
	t.prime, t.occupied = nt.prime, t.used
}

// tableHash is GLib's string hash; 0 and 1 are kept for free and removed slots there.
func tableHash(key string) uint32 {
	h := uint32(5381)
	for i := 0; i < len(key); i++ {
		h = h*33 + uint32(int32(int8(key[i])))
	}
	return max(h, 2)
}
