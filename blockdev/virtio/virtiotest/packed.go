package virtiotest

import (
	"encoding/binary"

	"qblockd/blockdev/virtio"
)

// packedRing is a packed queue.
type packedRing struct {
	d         *Driver
	room      int
	ids       []uint16
	next      int
	wrap      bool
	usedAt    int
	usedWrap  bool
	positions uint16 // descriptors made available so far
}

func newPackedRing(d *Driver) *packedRing {
	r := &packedRing{d: d, room: d.Size, wrap: true, usedWrap: true}
	for i := range d.Size {
		r.ids = append(r.ids, uint16(d.Size-1-i))
	}
	return r
}

func (r *packedRing) index() uint16 { return r.positions }

func (r *packedRing) desc(i int) uint64 { return r.d.Desc + 16*uint64(i) }

func (r *packedRing) add(bufs []Buf, indirect bool) (uint16, *chain, bool) {
	d, n := r.d, len(bufs)
	if indirect {
		n = 1
	}
	if n > r.room {
		return 0, nil, false
	}
	id := r.ids[0]
	r.ids = r.ids[1:]
	if indirect {
		at := d.indirectTable(id, bufs, func(b []byte, _ int, f Buf) { put(b, f.Addr, f.Len, 0xaaaa, flagsOf(f)) })
		bufs = []Buf{{Addr: at, Len: uint32(16 * len(bufs))}}
	}
	first, firstFlags := r.next, uint16(0)
	for i, f := range bufs {
		flags := flagsOf(f)
		if indirect {
			flags = fIndirect
		}
		if i < n-1 {
			flags |= fNext
		}
		if r.wrap {
			flags |= fAvail
		} else {
			flags |= fUsed
		}
		b := d.G.At(r.desc(r.next), 16)
		if i == 0 {
			firstFlags = flags
			put(b, f.Addr, f.Len, id, binary.LittleEndian.Uint16(b[14:]))
		} else {
			put(b, f.Addr, f.Len, id, flags)
		}
		if r.next++; r.next == d.Size {
			r.next, r.wrap = 0, !r.wrap
		}
	}
	d.G.Store16(r.desc(first)+14, firstFlags)
	r.room -= n
	r.positions += uint16(n)
	return id, &chain{slots: n}, true
}

func (r *packedRing) pending() bool {
	flags := r.d.G.Load16(r.desc(r.usedAt) + 14)
	return flags&fAvail != 0 == r.usedWrap && flags&fUsed != 0 == r.usedWrap
}

func (r *packedRing) used() (uint16, uint32, bool) {
	if !r.pending() {
		return 0, 0, false
	}
	b := r.d.G.At(r.desc(r.usedAt), 16)
	return binary.LittleEndian.Uint16(b[12:]), binary.LittleEndian.Uint32(b[8:]), true
}

func (r *packedRing) free(c *chain, id uint16) {
	r.ids = append(r.ids, id)
	r.room += c.slots
	if r.usedAt += c.slots; r.usedAt >= r.d.Size {
		r.usedAt, r.usedWrap = r.usedAt-r.d.Size, !r.usedWrap
	}
}

func (r *packedRing) wantsKick(old uint16) bool {
	offWrap, flags := r.d.G.Load16(r.d.Dev), r.d.G.Load16(r.d.Dev+2)
	if flags&3 != 2 || r.d.Features&virtio.FEventIdx == 0 {
		return flags&3 != 1
	}
	// Count back from the next descriptor to the one that is waited for.
	at, wrap := r.next, r.wrap
	for range r.positions - old {
		if at--; at < 0 {
			at, wrap = r.d.Size-1, !wrap
		}
		if at == int(offWrap&0x7fff) && wrap == (offWrap>>15 != 0) {
			return true
		}
	}
	return false
}

func (r *packedRing) interrupts(on bool) {
	switch {
	case !on:
		r.d.G.Store16(r.d.Drv+2, 1)
	case r.d.Features&virtio.FEventIdx != 0:
		offWrap := uint16(r.usedAt)
		if r.usedWrap {
			offWrap |= 1 << 15
		}
		r.d.G.Store16(r.d.Drv, offWrap)
		r.d.G.Store16(r.d.Drv+2, 2)
	default:
		r.d.G.Store16(r.d.Drv+2, 0)
	}
}
