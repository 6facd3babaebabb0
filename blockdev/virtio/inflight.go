package virtio

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// The area of what is in flight outlives the device: a part for each queue, in the layout of
// vhost-user (Inflight I/O tracking). Who comes after a crash finds there what was popped and
// not published. Stores are in an order in which that is so after each; where several fields change
// at once they share a word of 64 bits.
//
// The driver cannot write to the area but the front end can: what this device has written it keeps
// a copy of, and reads the area in the beginning only.

// inflightAlign is what the parts' sizes are multiples of, in bytes.
const inflightAlign = 64

// inflightVersion is the layout; 0 stands for memory that was not used yet.
const inflightVersion = 1

// InflightSize is how many bytes a queue's part of the area has: a multiple of 64.
func InflightSize(size int, packed bool) int {
	n := splitAreaHead + splitAreaEntry*size
	if packed {
		n = packedAreaHead + packedAreaEntry*size
	}
	return (n + inflightAlign - 1) &^ (inflightAlign - 1)
}

// errArea: no device of ours leaves the area like that.
var errArea = errors.New("the area of what is in flight is damaged")

// checkArea refuses memory that is too short.
func checkArea(b []byte, size int, packed bool) error {
	switch need := InflightSize(size, packed); {
	case b == nil:
		return nil
	case len(b) < need:
		return fmt.Errorf("the area of what is in flight has %d bytes for a queue, needed are %d", len(b), need)
	case addr(b)%8 != 0:
		return errors.New("the area of what is in flight is not aligned to 8 bytes")
	}
	return nil
}

const (
	splitAreaHead  = 16
	splitAreaEntry = 16
)

// splitArea is the part of a split queue.
//
//	le64 features; le16 version, size, last_batch_head, used_idx
//	{u8 inflight, padding[5]; le16 next; le64 counter}[size]
//
// The entries of the chains that were published last are a list from last_batch_head on: they still
// say inflight when the device ends before it clears that, and as many of them are over as
// the used index of the ring is ahead of used_idx.
type splitArea struct {
	b         []byte
	size      int
	counter   uint64
	batchHead uint16
	usedIdx   uint16
	nexts     []uint16
}

func newSplitArea(b []byte, size int) *splitArea {
	if b == nil {
		return nil
	}
	return &splitArea{b: b, size: size, nexts: make([]uint16, size)}
}

func (a *splitArea) head() {
	store64(a.b, 8, inflightVersion|uint64(a.size)<<16|uint64(a.batchHead)<<32|uint64(a.usedIdx)<<48)
}

func (a *splitArea) entry(i int, inflight uint64) {
	store64(a.b, splitAreaHead+splitAreaEntry*i, inflight|uint64(a.nexts[i])<<48)
}

// popped: the chain with this head is in flight.
func (a *splitArea) popped(head int) {
	store64(a.b, splitAreaHead+splitAreaEntry*head+8, a.counter)
	a.counter++
	a.entry(head, 1)
}

// finishing comes before done is published, finished after it, with the ring's used index.
func (a *splitArea) finishing(done []used) {
	for _, u := range done {
		a.nexts[u.id] = a.batchHead
		a.entry(int(u.id), 1)
		a.batchHead = u.id
	}
	a.head()
}

func (a *splitArea) finished(done []used, usedIdx uint16) {
	for _, u := range done {
		a.entry(int(u.id), 0)
	}
	a.usedIdx = usedIdx
	a.head()
}

// recover returns the heads of what was in flight when a device left the area, while the used index
// is usedIdx; the area then says so, too.
func (a *splitArea) recover(usedIdx uint16) (heads []uint16, err error) {
	w := load64(a.b, 8)
	if version := uint16(w); version == 0 {
		a.usedIdx = usedIdx
		a.head()
		return nil, nil
	} else if version != inflightVersion || int(uint16(w>>16)) != a.size {
		return nil, errArea
	}
	counters := make([]uint64, a.size)
	inflight := make([]bool, a.size)
	for i := range a.size {
		e := load64(a.b, splitAreaHead+splitAreaEntry*i)
		inflight[i], a.nexts[i] = uint8(e) != 0, uint16(e>>48)
		counters[i] = load64(a.b, splitAreaHead+splitAreaEntry*i+8)
	}
	a.batchHead, a.usedIdx = uint16(w>>32), uint16(w>>48)
	if slices.Contains(inflight, true) {
		over := int(usedIdx - a.usedIdx)
		if over > a.size {
			return nil, errArea
		}
		for i := a.batchHead; over > 0; over-- {
			if int(i) >= a.size {
				return nil, errArea
			}
			inflight[i] = false
			i = a.nexts[i]
		}
	}
	for i, f := range inflight {
		a.entry(i, uint64(bit(f)))
		if f {
			heads = append(heads, uint16(i))
			a.counter = max(a.counter, counters[i]+1)
		}
	}
	slices.SortFunc(heads, func(x, y uint16) int { return cmp.Compare(counters[x], counters[y]) })
	a.usedIdx = usedIdx
	a.head()
	return heads, nil
}
