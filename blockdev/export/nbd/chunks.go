package nbd

import (
	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// chunks makes the reply to a read, from off on up to end.
type chunks struct {
	form        nbdwire.Form
	q           *nbdwire.Request
	off, end    int64
	first, last *reply
}

// flags are those of a chunk of n bytes.
func (c *chunks) flags(n int64) uint16 {
	if c.off+n == c.end {
		return nbdwire.ChunkDone
	}
	return 0
}

// hole goes on with n bytes of zeroes.
func (c *chunks) hole(n int64) {
	c.room()
	c.last.head = c.form.AppendHole(c.last.head, c.flags(n), c.q, uint64(c.off), uint32(n))
	c.off += n
}

// data goes on with b.
func (c *chunks) data(b []byte) {
	c.room()
	n := int64(len(b))
	c.last.head = c.form.AppendDataHead(c.last.head, c.flags(n), c.q, uint64(c.off), int(n))
	c.last.data = b
	c.off += n
}

// room sees to it that something may come behind what there is.
func (c *chunks) room() {
	if c.last.data != nil {
		c.last.next = newReply()
		c.last = c.last.next
	}
}

// content goes on with b, as data and holes. What is zero is looked at in pieces, so that few bytes
// of data are.
func (c *chunks) content(b []byte) {
	const piece = mapMin
	for len(b) > 0 {
		n := min(piece, len(b))
		zero := blk.IsZero(b[:n])
		for n < len(b) {
			k := min(piece, len(b)-n)
			if blk.IsZero(b[n:n+k]) != zero {
				break
			}
			n += k
		}
		if zero {
			c.hole(int64(n))
		} else {
			c.data(b[:n])
		}
		b = b[n:]
	}
}

// fail ends the reply with an error.
func (c *chunks) fail(err error, msg string) *reply {
	c.room()
	c.last.head = c.form.AppendErrorOffset(c.last.head, c.q, nbdwire.Errno(err), uint64(c.off), msg)
	c.first.fault = err
	return c.first
}
