package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Flags of the rings.
const (
	availNoInterrupt = 1
	usedNoNotify     = 1
)

// split is a queue of three parts (virtio 1.2, 2.7). Offsets are those of the fields in their
// slices, which begin with a whole word of 32 bits.
//
//	avail: le16 flags, idx, ring[size], used_event
//	used:  le16 flags, idx; {le32 id, len}[size]; le16 avail_event
type split struct {
	q                 *Queue
	desc, avail, used []byte
	availAt           int
	mask              uint16
	nextIdx, seen     uint16 // index of the next available entry; avail.idx as last read
	usedIdx           uint16
	usedFlags         uint16
	bound             bool       // the device's indices are known
	busy              []uint64   // set of heads that are in flight
	area              *splitArea // nil: nothing is kept of what is in flight
	resume            []uint16   // heads that were in flight, to be popped first
}

func newSplit(q *Queue, base uint32, area []byte) *split {
	return &split{
		q: q, area: newSplitArea(area, q.size), mask: uint16(q.size - 1), nextIdx: uint16(base), seen: uint16(base),
		busy: make([]uint64, (q.size+63)/64),
	}
}

func (s *split) bind() (err error) {
	m, n, r := s.q.mem, uint64(s.q.size), s.q.rings
	event := uint64(0)
	if s.q.features&FEventIdx != 0 {
		event = 2
	}
	if s.desc, _, err = m.user("the descriptor table", r.Desc, n*descSize, descSize); err != nil {
		return err
	}
	if s.avail, s.availAt, err = m.user("the available ring", r.Driver, 4+2*n+event, 2); err != nil {
		return err
	}
	if s.used, _, err = m.user("the used ring", r.Device, 4+8*n+event, 4); err != nil {
		return err
	}
	if s.bound {
		return nil
	}
	s.bound = true
	flagsIdx := load32(s.used, 0)
	s.usedFlags, s.usedIdx = uint16(flagsIdx), uint16(flagsIdx>>16)
	if s.area == nil {
		return nil
	}
	if s.resume, err = s.area.recover(s.usedIdx); err != nil {
		return err
	}
	s.nextIdx = s.usedIdx + uint16(len(s.resume))
	s.seen = s.nextIdx
	return nil
}

func (s *split) base() uint32 { return uint32(s.nextIdx) }

func (s *split) pending() (bool, error) {
	if s.nextIdx != s.seen || len(s.resume) > 0 {
		return true, nil
	}
	idx := load16(s.avail, s.availAt+2)
	if n := int(idx - s.nextIdx); n > s.q.size {
		return false, fmt.Errorf("the available index went from %d to %d in a queue of %d", s.nextIdx, idx, s.q.size)
	}
	s.seen = idx
	return s.nextIdx != idx, nil
}

func (s *split) next(c *Chain) (bool, error) {
	if len(s.resume) > 0 {
		head := s.resume[0]
		s.resume = s.resume[1:]
		return true, s.take(c, int(head))
	}
	if s.nextIdx == s.seen {
		if ok, err := s.pending(); !ok || err != nil {
			return false, err
		}
	}
	head := int(load16(s.avail, s.availAt+4+2*int(s.nextIdx&s.mask)))
	if head >= s.q.size {
		return false, fmt.Errorf("head %d in a queue of %d", head, s.q.size)
	}
	if err := s.take(c, head); err != nil {
		return false, err
	}
	if s.area != nil {
		s.area.popped(head)
	}
	s.nextIdx++
	return true, nil
}

// take appends the chain with this head to c.
func (s *split) take(c *Chain, head int) error {
	if s.busy[head/64]&(1<<(head%64)) != 0 {
		return fmt.Errorf("head %d is available while the device has it", head)
	}
	if err := s.q.walkSplit(c, s.desc, head); err != nil {
		return err
	}
	s.busy[head/64] |= 1 << (head % 64)
	c.id = uint16(head)
	return nil
}

func (s *split) publish(done []used) (bool, error) {
	old := s.usedIdx
	if s.area != nil {
		s.area.finishing(done)
	}
	for _, u := range done {
		off := 4 + 8*int(s.usedIdx&s.mask)
		if err := s.q.logUsed(off, 8); err != nil {
			return false, err
		}
		stepped()
		e := s.used[off:][:8]
		binary.LittleEndian.PutUint32(e, uint32(u.id))
		binary.LittleEndian.PutUint32(e[4:], u.written)
		s.usedIdx++
		s.busy[u.id/64] &^= 1 << (u.id % 64)
	}
	if err := s.storeUsed(); err != nil {
		return false, err
	}
	if s.area != nil {
		s.area.finished(done, s.usedIdx)
	}
	if s.q.features&FEventIdx == 0 {
		return load16(s.avail, s.availAt)&availNoInterrupt == 0, nil
	}
	return passed(load16(s.avail, s.availAt+4+2*s.q.size), s.usedIdx, old), nil
}

// storeUsed writes the flags and the index of the used ring, which share a word of ours.
func (s *split) storeUsed() error {
	store32(s.used, 0, uint32(s.usedFlags)|uint32(s.usedIdx)<<16)
	return s.q.logUsed(0, 4)
}

// passed tells whether an index that went from old to now was at event meanwhile, and left it.
func passed(event, now, old uint16) bool { return now-event-1 < now-old }

func (s *split) kicks(on bool) error {
	if s.q.features&FEventIdx != 0 {
		if on {
			off := 4 + 8*s.q.size
			return errors.Join(store16(s.used, off, s.nextIdx), s.q.logUsed(off, 2))
		}
		return nil // the driver kicks once, when it leaves the index that it was told last
	}
	s.usedFlags = usedNoNotify
	if on {
		s.usedFlags = 0
	}
	return s.storeUsed()
}
