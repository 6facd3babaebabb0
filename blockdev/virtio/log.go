package virtio

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
)

// logPage is how many bytes of the guest's memory a bit of a log stands for.
const logPage = 4096

// Log is a bitmap of the pages of a guest's memory that the device has written since the front end
// cleared them: page i is bit i%8 of byte i/8. Both sides change it atomically. All may use it.
type Log struct {
	m *Mapping
}

// NewLog is a log in all of m, of which it keeps a reference until Release. Error: it does not
// begin at a multiple of 4 bytes, or has no whole number of such words.
func NewLog(m *Mapping) (*Log, error) {
	if addr(m.bytes)%4 != 0 || len(m.bytes)%4 != 0 {
		return nil, fmt.Errorf("a log of %d bytes is not aligned to 4 bytes", len(m.bytes))
	}
	m.refs.Add(1)
	return &Log{m}, nil
}

// Release gives the memory back. The queues that the log was set for must have another one, or
// be closed.
func (l *Log) Release() { l.m.Release() }

// Mark says that n bytes at a guest's address were written. That comes before the driver is told of
// them, and is a barrier: who clears a bit and then reads the page has them. Error: the
// log is too small, and the page is not marked.
func (l *Log) Mark(at, n uint64) error {
	if n == 0 {
		return nil
	}
	if at > math.MaxUint64-n || (at+n-1)/logPage/8 >= uint64(len(l.m.bytes)) {
		return fmt.Errorf("%d bytes at guest address %#x are not in a log of %d bytes", n, at, len(l.m.bytes))
	}
	for page, last := at/logPage, (at+n-1)/logPage; page <= last; {
		// All pages that share a word, at once.
		upTo := min(page|31, last)
		mask := uint32(1<<(upTo-page+1)-1) << (page & 31)
		stepped()
		atomic.OrUint32(word32(l.m.bytes, int(page/32*4)), mask)
		page = upTo + 1
	}
	return nil
}

// dirty is where a queue's writes are logged.
type dirty struct {
	log    *Log   // nil: nowhere
	rings  bool   // the rings, too
	usedAt uint64 // guest address of a split queue's used ring, for the log alone
}

// SetLog has the queue log what it writes from now on: buffers and, if rings, what it writes to
// its rings; a split queue's used ring is logged as if it were at guest address usedAt. Buffers
// count when they are put. Nil: nothing is logged any more.
func (q *Queue) SetLog(l *Log, rings bool, usedAt uint64) { q.dirty = dirty{l, rings, usedAt} }

// logBuffer marks what c has for the device to write.
func (q *Queue) logBuffer(c *Chain) error {
	for _, b := range c.In() {
		if err := q.logMemory(c.mem, b); err != nil {
			return err
		}
	}
	return nil
}

// logMemory marks b, which is m's.
func (q *Queue) logMemory(m *Memory, b []byte) error {
	at, ok := m.guestOf(b)
	if !ok {
		return errors.New("memory that was written is nowhere in the guest")
	}
	return q.dirty.log.Mark(at, uint64(len(b)))
}

// logRing marks a part of a ring in the queue's memory, if rings are logged.
func (q *Queue) logRing(b []byte) error {
	if q.dirty.log == nil || !q.dirty.rings {
		return nil
	}
	return q.logMemory(q.mem, b)
}

// logUsed marks n bytes of a split queue's used ring, if rings are logged.
func (q *Queue) logUsed(off, n int) error {
	if q.dirty.log == nil || !q.dirty.rings {
		return nil
	}
	if q.dirty.usedAt > math.MaxUint64-uint64(off) {
		return fmt.Errorf("a used ring is logged at guest address %#x", q.dirty.usedAt)
	}
	return q.dirty.log.Mark(q.dirty.usedAt+uint64(off), uint64(n))
}
