package virtio

import (
	"encoding/binary"
	"fmt"
)

// Flags of event suppression.
const (
	eventsEnabled  = 0
	eventsDisabled = 1
	eventsAt       = 2 // only for one descriptor
)

// packed is a queue of one ring, in which used descriptors take the place of available ones
// (virtio 1.2, 2.8).
//
//	ring: {le64 addr; le32 len; le16 id, flags}[size]
//	driver, device: le16 descriptor index and wrap counter; le16 flags
type packed struct {
	q                    *Queue
	ring, driver, device []byte
	avail, used          position
	slots                int         // taken by what is in flight
	area                 *packedArea // nil: nothing is kept of what is in flight
	resume               []uint16    // entries of the area that were in flight, to be popped first
	bound                bool
}

// position is a place in the ring, with the counter that flips each time the ring begins anew.
type position struct {
	at   uint16
	wrap bool
}

// advanced is p after n slots, at most the size of the ring.
func (p position) advanced(n, size int) position {
	if at := int(p.at) + n; at >= size {
		return position{uint16(at - size), !p.wrap}
	}
	return position{p.at + uint16(n), p.wrap}
}

// bits is how positions are written: the wrap counter is bit 15.
func (p position) bits() uint16 {
	if p.wrap {
		return p.at | 1<<15
	}
	return p.at
}

func positionOf(bits uint16) position { return position{bits & (1<<15 - 1), bits>>15 != 0} }

// availableFlags and usedFlags are what descriptors at p have of flagAvail and flagUsed when they
// are available, and when they are used.
func (p position) availableFlags() uint16 {
	if p.wrap {
		return flagAvail
	}
	return flagUsed
}

func (p position) usedFlags() uint16 {
	if p.wrap {
		return flagAvail | flagUsed
	}
	return 0
}

func newPacked(q *Queue, base uint32, area []byte) *packed {
	return &packed{
		q: q, area: newPackedArea(area, q.size),
		avail: positionOf(uint16(base)), used: positionOf(uint16(base >> 16)),
	}
}

func (p *packed) bind() (err error) {
	m, r := p.q.mem, p.q.rings
	if int(p.avail.at) >= p.q.size || int(p.used.at) >= p.q.size {
		return fmt.Errorf("a queue of %d cannot begin at %d and %d", p.q.size, p.avail.at, p.used.at)
	}
	if p.ring, _, err = m.user("the descriptor ring", r.Desc, uint64(p.q.size)*descSize, descSize); err != nil {
		return err
	}
	if p.driver, _, err = m.user("driver event suppression", r.Driver, 4, 4); err != nil {
		return err
	}
	if p.device, _, err = m.user("device event suppression", r.Device, 4, 4); err != nil || p.bound {
		return err
	}
	p.bound = true
	if p.area == nil {
		return nil
	}
	return p.recover()
}

// recover goes on where the area says that the device before stood.
func (p *packed) recover() (err error) {
	p.resume, p.used, err = p.area.recover(p.used, func(at position) bool {
		return uint16(p.idFlags(at.at)>>16)&(flagAvail|flagUsed) != at.availableFlags()
	})
	if err != nil {
		return err
	}
	for _, head := range p.resume {
		p.slots += int(p.area.entries[head].num)
	}
	// What follows the first of a batch that was not shown any more may be there: the driver would
	// take it for used when it comes to it.
	at := p.used
	for range p.slots {
		w := p.idFlags(at.at)
		if want := uint32(at.availableFlags()) << 16; w&((flagAvail|flagUsed)<<16) != want {
			store32(p.ring, int(at.at)*descSize+12, w&^((flagAvail|flagUsed)<<16)|want)
		}
		at = at.advanced(1, p.q.size)
	}
	p.avail = at
	return nil
}

func (p *packed) base() uint32 { return uint32(p.avail.bits()) | uint32(p.used.bits())<<16 }

// idFlags is the word with the buffer's id and, in the upper half, the flags.
func (p *packed) idFlags(at uint16) uint32 { return load32(p.ring, int(at)*descSize+12) }

func (p *packed) pending() (bool, error) {
	if len(p.resume) > 0 {
		return true, nil
	}
	flags := uint16(p.idFlags(p.avail.at) >> 16)
	return flags&(flagAvail|flagUsed) == p.avail.availableFlags() && p.slots < p.q.size, nil
}

func (p *packed) next(c *Chain) (bool, error) {
	if len(p.resume) > 0 {
		head := p.resume[0]
		p.resume = p.resume[1:]
		return true, p.again(c, head)
	}
	if ok, err := p.pending(); !ok || err != nil {
		return false, err
	}
	at, free := p.avail, p.q.size-p.slots
	for n := 1; ; n++ {
		if n > free {
			return false, fmt.Errorf("a chain is longer than the %d descriptors that are not in flight", free)
		}
		d := packedDesc(p.ring, int(at.at))
		at = at.advanced(1, p.q.size)
		if p.area != nil {
			p.area.keep(d, n)
		}
		if last, err := p.q.addPacked(c, d, n); err != nil {
			return false, err
		} else if last {
			break
		}
	}
	if p.area != nil {
		c.tracked = p.area.popped(int(c.slots))
	}
	p.avail = at
	p.slots += int(c.slots)
	return true, nil
}

// again appends the chain that was in flight at entry head of the area to c.
func (p *packed) again(c *Chain, head uint16) error {
	for n, i := 1, head; ; n++ {
		d := p.area.kept(i)
		last, err := p.q.addPacked(c, d, n)
		if err != nil {
			return err
		}
		e := &p.area.entries[i]
		if last != (i == p.area.entries[head].last) {
			return errArea
		}
		if last {
			c.tracked = head
			return nil
		}
		i = e.next
	}
}

func (p *packed) publish(done []used) (bool, error) {
	old, now := p.used, p.used
	for _, u := range done {
		now = now.advanced(int(u.slots), p.q.size)
	}
	if p.area != nil {
		p.area.finishing(done, now)
	}
	// The first descriptor is the one that the driver looks at: it is shown last.
	at := old
	for i, u := range done {
		if i > 0 {
			if err := p.writeUsed(at, u); err != nil {
				return false, err
			}
		}
		at = at.advanced(int(u.slots), p.q.size)
		p.slots -= int(u.slots)
	}
	if err := p.writeUsed(old, done[0]); err != nil {
		return false, err
	}
	p.used = now
	if p.area != nil {
		p.area.finished(done)
	}
	return p.wanted(old), nil
}

// writeUsed makes the descriptor at a place a used one.
func (p *packed) writeUsed(at position, u used) error {
	off := int(at.at) * descSize
	stepped()
	binary.LittleEndian.PutUint32(p.ring[off+8:], u.written)
	flags := at.usedFlags()
	if u.written > 0 {
		flags |= flagWrite
	}
	store32(p.ring, off+12, uint32(u.id)|uint32(flags)<<16)
	return p.q.logRing(p.ring[off:][:descSize])
}

// wanted tells whether the driver wants to be notified of the descriptors from old on.
func (p *packed) wanted(old position) bool {
	event := load32(p.driver, 0)
	switch flags := event >> 16 & 3; {
	case flags == eventsDisabled:
		return false
	case flags != eventsAt || p.q.features&FEventIdx == 0:
		return true
	}
	// All in slots since the ring began anew, negative before.
	at, now, from := positionOf(uint16(event)), int(p.used.at), int(old.at)
	if old.wrap != p.used.wrap {
		from -= p.q.size
	}
	e := int(at.at)
	if at.wrap != p.used.wrap {
		e -= p.q.size
	}
	return from <= e && e < now
}

func (p *packed) kicks(on bool) error {
	w := uint32(eventsDisabled << 16)
	switch {
	case on && p.q.features&FEventIdx != 0:
		w = uint32(p.avail.bits()) | eventsAt<<16
	case on:
		w = eventsEnabled << 16
	}
	store32(p.device, 0, w)
	return p.q.logRing(p.device)
}
