package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Chain is a buffer of the driver's: what one chain of descriptors says. It is the memory for one;
// whoever pools them pools its slices, too. Between Queue.Pop and Queue.Put or Queue.Drop it keeps
// the guest's memory mapped.
type Chain struct {
	segs   [][]byte
	outs   int    // of segs are for the device to read; the others are for it to write
	outLen uint64 // bytes
	inLen  uint64
	mem    *Memory
	id     uint16 // the head's index in split queues, the buffer's id in packed ones
	slots  uint16 // of a packed ring that it takes
	// tracked is the entry of its head in the area of what is in flight, in packed queues.
	tracked uint16
}

// Out is the memory that the device may read, In what it may write. They are valid until Put or
// Drop.
func (c *Chain) Out() [][]byte { return c.segs[:c.outs] }
func (c *Chain) In() [][]byte  { return c.segs[c.outs:] }

// OutLen and InLen are their lengths, in bytes.
func (c *Chain) OutLen() uint64 { return c.outLen }
func (c *Chain) InLen() uint64  { return c.inLen }

// reset makes c empty, for descriptors of mem.
func (c *Chain) reset(mem *Memory) {
	clear(c.segs)
	c.segs = c.segs[:0]
	c.outs, c.outLen, c.inLen, c.mem = 0, 0, 0, mem
}

// end gives the memory back and forgets its pointers.
func (c *Chain) end() {
	mem := c.mem
	c.reset(nil)
	mem.Release()
}

// Flags of descriptors.
const (
	flagNext     = 1
	flagWrite    = 2
	flagIndirect = 4
	flagAvail    = 1 << 7  // packed
	flagUsed     = 1 << 15 // packed
)

const descSize = 16

// descriptor is a copy of one in guest memory, of either kind of ring.
type descriptor struct {
	addr  uint64
	len   uint32
	flags uint16
	next  uint16 // split: the next one of the chain. packed: the buffer's id
}

// splitDesc reads the i-th descriptor of a table once.
func splitDesc(table []byte, i int) descriptor {
	b := *(*[descSize]byte)(table[i*descSize:])
	return descriptor{
		addr: binary.LittleEndian.Uint64(b[0:]), len: binary.LittleEndian.Uint32(b[8:]),
		flags: binary.LittleEndian.Uint16(b[12:]), next: binary.LittleEndian.Uint16(b[14:]),
	}
}

// packedDesc is the same for packed rings, where the last two fields change places.
func packedDesc(table []byte, i int) descriptor {
	d := splitDesc(table, i)
	d.flags, d.next = d.next, d.flags
	return d
}

const (
	// maxIndirect is how long a chain may be at least if it is indirect: drivers do not ask how
	// large the queue is.
	maxIndirect = 1024
	// morePieces is how many more pieces than descriptors a chain may have, because descriptors
	// span regions.
	morePieces = 1024
	// maxChain is the most bytes of a chain; the specification says so.
	maxChain = 1 << 32
)

// add appends what d describes to c.
func (q *Queue) add(c *Chain, d descriptor) (err error) {
	n := uint64(d.len)
	switch {
	case n == 0:
		return fmt.Errorf("a descriptor at guest address %#x is empty", d.addr)
	case c.outLen+c.inLen+n > maxChain:
		return fmt.Errorf("a buffer is longer than %d bytes", uint64(maxChain))
	case d.flags&flagWrite == 0 && c.inLen > 0:
		return fmt.Errorf("a descriptor for reading, at guest address %#x, follows one for writing", d.addr)
	case d.addr > math.MaxUint64-n:
		return fmt.Errorf("a descriptor of %d bytes at guest address %#x overflows", n, d.addr)
	}
	if c.segs, err = q.mem.appendGuest(c.segs, d.addr, n, &q.hint, q.maxDescs+morePieces); err != nil {
		return err
	}
	if d.flags&flagWrite != 0 {
		c.inLen += n
	} else {
		c.outLen += n
		c.outs = len(c.segs)
	}
	return nil
}

// indirect is the table that d refers to: the guest's memory, or a copy if it is not in one piece.
func (q *Queue) indirect(d descriptor) ([]byte, error) {
	switch n := d.len; {
	case q.features&FIndirect == 0:
		return nil, errors.New("a descriptor is indirect, which was not negotiated")
	case d.flags&flagNext != 0:
		return nil, errors.New("an indirect descriptor has a next one")
	case n == 0 || n%descSize != 0 || n > descSize<<16:
		return nil, fmt.Errorf("an indirect table has %d bytes", n)
	case d.addr > math.MaxUint64-uint64(n):
		return nil, fmt.Errorf("an indirect table of %d bytes at guest address %#x overflows", n, d.addr)
	}
	var err error
	q.pieces, err = q.mem.appendGuest(q.pieces[:0], d.addr, uint64(d.len), &q.hint, q.maxDescs+morePieces)
	if err != nil {
		return nil, fmt.Errorf("an indirect table: %w", err)
	}
	if len(q.pieces) == 1 {
		return q.pieces[0], nil
	}
	q.gathered = q.gathered[:0]
	for _, p := range q.pieces {
		q.gathered = append(q.gathered, p...)
	}
	return q.gathered, nil
}

// walkSplit appends the chain that begins with descriptor i of table to c.
func (q *Queue) walkSplit(c *Chain, table []byte, i int) error {
	limit, inner := q.size, false
	for n := 1; ; n++ {
		if n > limit {
			return fmt.Errorf("a chain is longer than %d descriptors, or a loop", limit)
		}
		if i >= len(table)/descSize {
			return fmt.Errorf("descriptor %d of a table of %d", i, len(table)/descSize)
		}
		d := splitDesc(table, i)
		if d.flags&flagIndirect == 0 {
			if err := q.add(c, d); err != nil {
				return err
			}
			if d.flags&flagNext == 0 {
				return nil
			}
			i = int(d.next)
			continue
		}
		if inner {
			return errors.New("an indirect table has an indirect descriptor")
		}
		t, err := q.indirect(d)
		if err != nil {
			return err
		}
		table, i, inner, limit = t, 0, true, q.maxDescs
	}
}

// addPacked appends one descriptor of a packed ring to c, the n-th of its chain, and tells whether
// it is the last.
func (q *Queue) addPacked(c *Chain, d descriptor, n int) (last bool, err error) {
	c.id, c.slots = d.next, uint16(n)
	if d.flags&flagIndirect == 0 {
		return d.flags&flagNext == 0, q.add(c, d)
	}
	if n > 1 {
		return false, errors.New("a chain has an indirect descriptor")
	}
	return true, q.addTable(c, d)
}

// addTable appends all of the packed indirect table of d to c.
func (q *Queue) addTable(c *Chain, d descriptor) error {
	t, err := q.indirect(d)
	if err != nil {
		return err
	}
	n := len(t) / descSize
	if n > q.maxDescs {
		return fmt.Errorf("an indirect table has %d descriptors, allowed are %d", n, q.maxDescs)
	}
	for i := range n {
		if err := q.add(c, packedDesc(t, i)); err != nil {
			return err
		}
	}
	return nil
}
