package virtio

import (
	"errors"
	"fmt"

	"qblockd/blockdev/virtio/vanish"
)

// Rings are the addresses of a queue's three parts, in the front end's process.
type Rings struct {
	Desc   uint64 // descriptor table, or the packed ring of descriptors
	Driver uint64 // available ring, or driver event suppression
	Device uint64 // used ring, or device event suppression
}

// QueueConfig is what a queue is made of.
type QueueConfig struct {
	Size     int    // descriptors: 1 to MaxQueueSize; a power of two unless packed
	Features uint64 // negotiated: FPacked, FIndirect, FEventIdx count
	Memory   *Memory
	Rings    Rings
	Base     uint32 // where to begin, as Queue.Base tells
	// Inflight is memory that outlives the device, for what is in flight: InflightSize bytes at a
	// multiple of 8, zero at first. Nil: a crash loses it. If a queue used it before, what that one
	// had popped and not published is popped again first, in the same order, and
	// Base does not count.
	Inflight []byte
}

// Queue is the device's end of a virtqueue. Its methods read and write the guest's memory, never
// block and never panic for what is there.
type Queue struct {
	size     int
	maxDescs int // of a chain, if indirect
	features uint64
	mem      *Memory
	rings    Rings
	ring     ring
	staged   []used
	inFlight int
	err      error
	dirty    dirty
	faults   uint64 // vanish.Faults when none was in mem

	hint     int      // of mem.appendGuest
	pieces   [][]byte // of an indirect table
	gathered []byte   // its copy, if there are several
}

// ring is what differs between split and packed queues.
type ring interface {
	// bind looks up where the parts are in q.mem.
	bind() error
	// next appends the next chain to c, if there is one.
	next(c *Chain) (bool, error)
	// publish writes done and tells whether the driver wants to know.
	publish(done []used) (bool, error)
	pending() (bool, error)
	kicks(on bool) error
	base() uint32
}

// used is a chain that the device is done with.
type used struct {
	id, slots, tracked uint16
	written            uint32
}

// NewQueue begins to serve a queue. It takes a reference of the memory. Whoever makes a queue of
// rings that were in use before notifies the driver once, and looks for buffers without waiting for
// a kick: the one before may have ended between the two. Error: the rings are not in the memory, or
// nothing that can be.
func NewQueue(c QueueConfig) (*Queue, error) {
	if err := checkEndian(); err != nil {
		return nil, err
	}
	packed := c.Features&FPacked != 0
	if c.Size < 1 || c.Size > MaxQueueSize || !packed && c.Size&(c.Size-1) != 0 {
		return nil, fmt.Errorf("a virtqueue cannot have %d descriptors", c.Size)
	}
	if err := checkArea(c.Inflight, c.Size, packed); err != nil {
		return nil, err
	}
	q := &Queue{
		size: c.Size, maxDescs: max(c.Size, maxIndirect), features: c.Features, rings: c.Rings,
		mem: c.Memory, staged: make([]used, 0, c.Size),
	}
	if packed {
		q.ring = newPacked(q, c.Base, c.Inflight)
	} else {
		q.ring = newSplit(q, c.Base, c.Inflight)
	}
	if err := Guard(q.ring.bind); err != nil {
		return nil, err
	}
	q.mem.hold()
	return q, nil
}

// broken keeps the first error, which all later calls return.
func (q *Queue) broken(err error) error {
	if err != nil && q.err == nil {
		q.err = fmt.Errorf("virtqueue: %w", err)
	}
	return q.err
}

// Err is why the queue is broken, or nil.
func (q *Queue) Err() error { return q.err }

// errClosed: the queue was closed.
var errClosed = errors.New("closed")

// Close gives the memory back. Chains that were popped can only be dropped after it.
func (q *Queue) Close() {
	if q.mem == nil {
		return
	}
	clear(q.pieces[:cap(q.pieces)])
	q.ring, q.pieces = nil, nil
	q.mem.Release()
	q.mem = nil
	_ = q.broken(errClosed)
}

// InFlight is how many chains were popped and neither put nor dropped.
func (q *Queue) InFlight() int { return q.inFlight }

// Size is the number of descriptors.
func (q *Queue) Size() int { return q.size }

// Pop takes the next buffer of the driver's, if there is one.
func (q *Queue) Pop(c *Chain) (ok bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	err = Guard(func() (e error) {
		ok, e = q.pop(c)
		return e
	})
	if err != nil {
		return false, q.broken(err)
	}
	return ok, nil
}

// pop is Pop without a guard.
func (q *Queue) pop(c *Chain) (bool, error) {
	c.reset(q.mem)
	ok, err := q.ring.next(c)
	if gone := q.gone(); gone != nil {
		err = gone
	}
	if !ok || err != nil {
		c.reset(nil)
		return false, err
	}
	q.mem.hold()
	q.inFlight++
	return true, nil
}

// gone is ErrFault if memory of the queue was taken away: what was read may be zeroes instead.
func (q *Queue) gone() error {
	n := vanish.Faults()
	if n == q.faults {
		return nil
	}
	if err := q.mem.gone(); err != nil {
		return err
	}
	q.faults = n
	return nil
}

// Put stages a chain that is done, with the number of bytes that were written to its In, from the
// beginning on. The chain is empty after that, whatever Put returns.
func (q *Queue) Put(c *Chain, written uint32) error {
	q.inFlight--
	u := used{c.id, c.slots, c.tracked, written}
	var err error
	if q.dirty.log != nil {
		err = Guard(func() error { return q.logBuffer(c) })
	}
	c.end()
	if q.broken(err) != nil {
		return q.err
	}
	q.staged = append(q.staged, u)
	return nil
}

// Drop ends a chain of which the driver is not told: there is nobody any more to tell, or the
// device is reset.
func (q *Queue) Drop(c *Chain) {
	q.inFlight--
	c.end()
}

// Publish shows the driver all that is staged. notify: it wants to be notified now.
func (q *Queue) Publish() (notify bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	if len(q.staged) == 0 {
		return false, nil
	}
	err = Guard(func() (e error) {
		notify, e = q.ring.publish(q.staged)
		return errors.Join(e, q.gone())
	})
	q.staged = q.staged[:0]
	return notify && err == nil, q.broken(err)
}

// Pending tells whether there is a buffer to pop, for those who poll. A chain that is broken is
// one.
func (q *Queue) Pending() (ok bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	err = Guard(func() (e error) {
		ok, e = q.ring.pending()
		return e
	})
	return ok && err == nil, q.broken(err)
}

// EnableKicks asks the driver to kick when it makes the next buffer available, and tells whether
// it has done so meanwhile: then there may be no kick, and the buffers are to be popped. It
// is to be called each time before waiting for a kick.
func (q *Queue) EnableKicks() (more bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	err = Guard(func() error {
		e := q.ring.kicks(true)
		if e == nil {
			more, e = q.ring.pending()
		}
		return e
	})
	return more && err == nil, q.broken(err)
}

// DisableKicks tells the driver that kicks are not needed. It may kick all the same.
func (q *Queue) DisableKicks() error {
	if q.err != nil {
		return q.err
	}
	return q.broken(Guard(func() error { return q.ring.kicks(false) }))
}

// Base is where the queue stands, as vhost-user's GET_VRING_BASE tells it: the index of the next
// buffer; in packed queues with its wrap counter as bit 15, and the same of the next used
// descriptor in the upper half. It says all of a queue that has nothing in flight or staged. 0 if
// it is closed.
func (q *Queue) Base() uint32 {
	if q.ring == nil {
		return 0
	}
	return q.ring.base()
}

// SetMemory has the queue use another table; chains that were popped keep the old one. Error: the
// rings are not in it; the queue is broken then.
func (q *Queue) SetMemory(m *Memory) error {
	if q.err != nil {
		return q.err
	}
	m.hold()
	old := q.mem
	q.mem, q.hint, q.faults = m, 0, 0
	clear(q.pieces[:cap(q.pieces)])
	err := Guard(q.ring.bind)
	old.Release()
	return q.broken(err)
}
