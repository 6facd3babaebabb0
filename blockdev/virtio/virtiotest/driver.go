package virtiotest

import (
	"encoding/binary"

	"qblockd/blockdev/virtio"
)

// Buf is an element of a buffer: guest memory that the device reads, or writes.
type Buf struct {
	Addr  uint64
	Len   uint32
	Write bool
}

// Driver is the guest's end of a queue. It is used by one goroutine at a time.
type Driver struct {
	G        *Guest
	Size     int
	Features uint64
	Desc     uint64 // guest addresses of the three parts
	Drv      uint64
	Dev      uint64

	ring  driverRing
	busy  map[uint16]*chain // by head or id
	table map[uint16]table  // memory for the indirect table of each head or id
}

type table struct {
	at   uint64
	room int
}

// chain is what the device has.
type chain struct {
	token any
	descs []uint16 // split: descriptors to free
	slots int      // packed
}

// driverRing is what differs between split and packed queues.
type driverRing interface {
	add(bufs []Buf, indirect bool) (head uint16, c *chain, ok bool)
	used() (head uint16, written uint32, ok bool)
	free(c *chain, head uint16)
	wantsKick(old uint16) bool
	index() uint16
	interrupts(on bool)
	pending() bool
}

// NewDriver makes an empty queue in g.
func NewDriver(g *Guest, size int, features uint64) *Driver {
	d := &Driver{G: g, Size: size, Features: features, busy: map[uint16]*chain{}, table: map[uint16]table{}}
	d.Desc = g.Alloc(16*size, 16)
	if features&virtio.FPacked != 0 {
		d.Drv, d.Dev = g.Alloc(4, 4), g.Alloc(4, 4)
		d.ring = newPackedRing(d)
	} else {
		// The available ring at an odd half of a word, as it may be.
		d.Drv, d.Dev = g.Alloc(8+2*size, 4)+2, g.Alloc(6+8*size, 4)
		d.ring = newSplitRing(d)
	}
	return d
}

// Rings are the addresses as vhost-user tells them.
func (d *Driver) Rings() virtio.Rings {
	return virtio.Rings{Desc: d.G.UserOf(d.Desc), Driver: d.G.UserOf(d.Drv), Device: d.G.UserOf(d.Dev)}
}

// Base is where a device begins with the empty queue.
func (d *Driver) Base() uint32 {
	if d.Features&virtio.FPacked != 0 {
		return 1<<15 | 1<<31
	}
	return 0
}

// Add makes a buffer available. ok: there was room. kick: the device wants to know.
func (d *Driver) Add(token any, bufs []Buf, indirect bool) (kick, ok bool) {
	old := d.ring.index()
	head, c, ok := d.ring.add(bufs, indirect)
	if !ok {
		return false, false
	}
	c.token = token
	d.busy[head] = c
	return d.ring.wantsKick(old), true
}

// Used takes the next buffer that the device is done with.
func (d *Driver) Used() (token any, written uint32, ok bool) {
	head, written, ok := d.ring.used()
	if !ok {
		return nil, 0, false
	}
	c := d.busy[head]
	if c == nil {
		panic("virtiotest: the device used what it did not have")
	}
	delete(d.busy, head)
	d.ring.free(c, head)
	return c.token, written, true
}

// InFlight is how many buffers the device has.
func (d *Driver) InFlight() int { return len(d.busy) }

// Interrupts asks for notifications of the next used buffer, or for none; more: there is one.
func (d *Driver) Interrupts(on bool) (more bool) {
	d.ring.interrupts(on)
	return d.ring.pending()
}

// indirectTable writes bufs as a table of its own and returns its address.
func (d *Driver) indirectTable(head uint16, bufs []Buf, encode func(b []byte, i int, f Buf)) uint64 {
	if d.table[head].room < len(bufs) {
		d.table[head] = table{d.G.Alloc(16*len(bufs), 16), len(bufs)}
	}
	at := d.table[head].at
	for i, f := range bufs {
		encode(d.G.At(at+uint64(16*i), 16), i, f)
	}
	return at
}

const (
	fNext     = 1
	fWrite    = 2
	fIndirect = 4
	fAvail    = 1 << 7
	fUsed     = 1 << 15
)

func flagsOf(f Buf) uint16 {
	if f.Write {
		return fWrite
	}
	return 0
}

func put(b []byte, addr uint64, n uint32, third, fourth uint16) {
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], third)
	binary.LittleEndian.PutUint16(b[14:], fourth)
}

func need(event, now, old uint16) bool { return now-event-1 < now-old }

// splitRing is a split queue.
type splitRing struct {
	d        *Driver
	freeList []uint16
	avail    uint16
	seen     uint16 // used index
}

func newSplitRing(d *Driver) *splitRing {
	r := &splitRing{d: d}
	for i := range d.Size {
		r.freeList = append(r.freeList, uint16(i))
	}
	return r
}

func (r *splitRing) index() uint16 { return r.avail }

func (r *splitRing) add(bufs []Buf, indirect bool) (uint16, *chain, bool) {
	d, n := r.d, len(bufs)
	if indirect {
		n = 1
	}
	if n > len(r.freeList) {
		return 0, nil, false
	}
	c := &chain{descs: append([]uint16(nil), r.freeList[:n]...)}
	r.freeList = r.freeList[n:]
	head := c.descs[0]
	if indirect {
		at := d.indirectTable(head, bufs, func(b []byte, i int, f Buf) {
			flags, next := flagsOf(f), uint16(0)
			if i < len(bufs)-1 {
				flags, next = flags|fNext, uint16(i+1)
			}
			put(b, f.Addr, f.Len, flags, next)
		})
		put(d.G.At(d.Desc+16*uint64(head), 16), at, uint32(16*len(bufs)), fIndirect, 0)
	} else {
		for i, f := range bufs {
			flags, next := flagsOf(f), uint16(0)
			if i < n-1 {
				flags, next = flags|fNext, c.descs[i+1]
			}
			put(d.G.At(d.Desc+16*uint64(c.descs[i]), 16), f.Addr, f.Len, flags, next)
		}
	}
	d.G.Store16(d.Drv+4+2*uint64(int(r.avail)%d.Size), head)
	r.avail++
	d.G.Store16(d.Drv+2, r.avail)
	return head, c, true
}

func (r *splitRing) pending() bool { return r.d.G.Load16(r.d.Dev+2) != r.seen }

func (r *splitRing) used() (uint16, uint32, bool) {
	if !r.pending() {
		return 0, 0, false
	}
	e := r.d.G.At(r.d.Dev+4+8*uint64(int(r.seen)%r.d.Size), 8)
	r.seen++
	return uint16(binary.LittleEndian.Uint32(e)), binary.LittleEndian.Uint32(e[4:]), true
}

func (r *splitRing) free(c *chain, _ uint16) { r.freeList = append(r.freeList, c.descs...) }

func (r *splitRing) wantsKick(old uint16) bool {
	if r.d.Features&virtio.FEventIdx != 0 {
		return need(r.d.G.Load16(r.d.Dev+4+8*uint64(r.d.Size)), r.avail, old)
	}
	return r.d.G.Load16(r.d.Dev)&1 == 0
}

func (r *splitRing) interrupts(on bool) {
	flags := uint16(1)
	if on {
		flags = 0
		if r.d.Features&virtio.FEventIdx != 0 {
			r.d.G.Store16(r.d.Drv+4+2*uint64(r.d.Size), r.seen)
		}
	}
	r.d.G.Store16(r.d.Drv, flags)
}
