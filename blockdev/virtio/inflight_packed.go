package virtio

import (
	"cmp"
	"slices"
)

const (
	packedAreaHead  = 32
	packedAreaEntry = 32
)

// packedArea is the part of a packed queue. Used descriptors take the place of available ones in
// the ring, so the area keeps copies of those that are in flight.
//
//	le64 features; le16 version, size, free_head, old_free_head
//	le16 used_idx, old_used_idx; u8 used_wrap_counter, old_used_wrap_counter, padding[10]
//	{u8 inflight, padding; le16 next, last, num; le64 counter;
//	 le16 id, flags; le32 len; le64 addr}[size]
//
// Entries are linked by next: those of a chain, from its head, which has num of them and the index
// of the last, and those that are free. What is free is decided by old_free_head: a chain is in
// flight once its entries are not in that list any more. Publishing writes the new list and the new
// position in the ring to free_head and used_idx, then the ring, and then the same to the old ones:
// whether it took place in between the ring tells.
type packedArea struct {
	b       []byte
	size    int
	counter uint64
	entries []packedEntry
	free    uint16 // head of the list; size: none
	oldFree uint16
	used    position
	oldUsed position

	cursor uint16 // entry of the descriptor that is kept next
	last   uint16 // of those that were
}

type packedEntry struct {
	inflight        bool
	next, last, num uint16
}

func newPackedArea(b []byte, size int) *packedArea {
	if b == nil {
		return nil
	}
	return &packedArea{b: b, size: size, entries: make([]packedEntry, size)}
}

func (a *packedArea) storeFree() {
	store64(a.b, 8, inflightVersion|uint64(a.size)<<16|uint64(a.free)<<32|uint64(a.oldFree)<<48)
}

func (a *packedArea) storeUsed() {
	wraps := uint64(bit(a.used.wrap)) | uint64(bit(a.oldUsed.wrap))<<8
	store64(a.b, 16, uint64(a.used.at)|uint64(a.oldUsed.at)<<16|wraps<<32)
}

func (a *packedArea) at(i uint16) int { return packedAreaHead + packedAreaEntry*int(i) }

func (a *packedArea) store(i uint16) {
	e := &a.entries[i]
	store64(a.b, a.at(i), uint64(bit(e.inflight))|uint64(e.next)<<16|uint64(e.last)<<32|uint64(e.num)<<48)
}

// keep copies the n-th descriptor of a chain that is being popped.
func (a *packedArea) keep(d descriptor, n int) {
	if n == 1 {
		a.cursor = a.free
	}
	store64(a.b, a.at(a.cursor)+16, uint64(d.next)|uint64(d.flags)<<16|uint64(d.len)<<32)
	store64(a.b, a.at(a.cursor)+24, d.addr)
	a.last = a.cursor
	a.cursor = a.entries[a.cursor].next
}

// kept is a descriptor that keep has copied.
func (a *packedArea) kept(i uint16) descriptor {
	w := load64(a.b, a.at(i)+16)
	return descriptor{next: uint16(w), flags: uint16(w >> 16), len: uint32(w >> 32), addr: load64(a.b, a.at(i)+24)}
}

// popped: the chain of the n descriptors that were kept last is in flight. It returns its entry.
func (a *packedArea) popped(n int) uint16 {
	head := a.free
	e := &a.entries[head]
	e.inflight, e.last, e.num = true, a.last, uint16(n)
	store64(a.b, a.at(head)+8, a.counter)
	a.counter++
	a.store(head)
	a.free, a.oldFree = a.cursor, a.cursor
	a.storeFree()
	return head
}

// finishing comes before done is published, finished after it; now is the position in the ring
// then.
func (a *packedArea) finishing(done []used, now position) {
	for _, u := range done {
		last := a.entries[u.tracked].last
		a.entries[last].next = a.free
		a.store(last)
		a.free = u.tracked
	}
	a.used = now
	a.storeFree()
	a.storeUsed()
}

func (a *packedArea) finished(done []used) {
	for _, u := range done {
		a.entries[u.tracked].inflight = false
		a.store(u.tracked)
	}
	a.oldFree, a.oldUsed = a.free, a.used
	a.storeFree()
	a.storeUsed()
}

// recover returns the entries of the chains that were in flight when a device left the area, and
// where it stood in the ring: base, if it has not been used. shown tells whether the
// descriptor at a position is not available any more.
func (a *packedArea) recover(base position, shown func(position) bool) (heads []uint16, used position, err error) {
	w, u := load64(a.b, 8), load64(a.b, 16)
	if uint16(w) == 0 {
		a.begin(base)
		return nil, base, nil
	}
	if uint16(w) != inflightVersion || int(uint16(w>>16)) != a.size {
		return nil, base, errArea
	}
	a.free, a.oldFree = uint16(w>>32), uint16(w>>48)
	a.used = position{uint16(u), uint8(u>>32) != 0}
	a.oldUsed = position{uint16(u >> 16), uint8(u>>40) != 0}
	if int(a.used.at) >= a.size || int(a.oldUsed.at) >= a.size {
		return nil, base, errArea
	}
	if a.used != a.oldUsed && shown(a.oldUsed) {
		a.oldFree, a.oldUsed = a.free, a.used
	}
	a.free, a.used = a.oldFree, a.oldUsed
	if heads, err = a.load(); err != nil {
		return nil, base, err
	}
	for i := range a.entries {
		a.store(uint16(i))
	}
	a.storeFree()
	a.storeUsed()
	return heads, a.used, nil
}

// begin makes all entries free.
func (a *packedArea) begin(base position) {
	for i := range a.entries {
		a.entries[i] = packedEntry{next: uint16(i + 1)}
		a.store(uint16(i))
	}
	a.used, a.oldUsed = base, base
	a.storeUsed()
	a.storeFree()
}

// load reads the entries, and returns the heads that are in flight in order: each entry is
// free or of one chain.
func (a *packedArea) load() (heads []uint16, err error) {
	counters := make([]uint64, a.size)
	for i := range a.entries {
		w := load64(a.b, a.at(uint16(i)))
		a.entries[i] = packedEntry{uint8(w) != 0, uint16(w >> 16), uint16(w >> 32), uint16(w >> 48)}
		counters[i] = load64(a.b, a.at(uint16(i))+8)
	}
	seen := make([]bool, a.size)
	take := func(i uint16) bool {
		ok := int(i) < a.size && !seen[i]
		if ok {
			seen[i] = true
		}
		return ok
	}
	for i := a.free; int(i) != a.size; i = a.entries[i].next {
		if !take(i) {
			return nil, errArea
		}
		a.entries[i].inflight = false
	}
	for h := range a.entries {
		e := &a.entries[h]
		if !e.inflight {
			continue
		}
		heads = append(heads, uint16(h))
		i := uint16(h)
		for n := e.num; ; n-- {
			if n == 0 || !take(i) {
				return nil, errArea
			}
			if i == e.last {
				if n != 1 {
					return nil, errArea
				}
				break
			}
			i = a.entries[i].next
		}
		a.counter = max(a.counter, counters[h]+1)
	}
	if slices.Contains(seen, false) {
		return nil, errArea
	}
	slices.SortFunc(heads, func(x, y uint16) int { return cmp.Compare(counters[x], counters[y]) })
	return heads, nil
}
