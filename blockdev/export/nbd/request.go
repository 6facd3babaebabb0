package nbd

import (
	"errors"
	"fmt"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// What is said about requests that were refused by the device.
const (
	msgRead  = "reading from file failed"
	msgWrite = "writing to file failed"
	msgFlush = "flush failed"
	msgTrim  = "discard failed"

	msgInternal = "internal error"
	msgCache    = "caching data failed"
	msgStatus   = "can't get block status"
)

// check tells what is wrong with q by itself, as the reference words it; the payload of a
// write is not looked at. All these errors are EINVAL on the nbdwire.
func (c *conn) check(q *nbdwire.Request) error {
	valid := nbdwire.CmdFlagFUA
	writes := false
	switch q.Cmd {
	case nbdwire.CmdRead:
		if c.structured {
			valid |= nbdwire.CmdFlagDF
		}
	case nbdwire.CmdWrite, nbdwire.CmdTrim:
		writes = true
	case nbdwire.CmdWriteZeroes:
		valid |= nbdwire.CmdFlagNoHole | nbdwire.CmdFlagFastZero
		writes = true
	case nbdwire.CmdBlockStatus:
		valid |= nbdwire.CmdFlagReqOne
	}
	if writes && c.exp.spec.ReadOnly {
		return errReadOnly
	}
	size := uint64(c.exp.spec.Size)
	if q.Off > size || uint64(q.Len) > size-q.Off {
		return fmt.Errorf("operation past EOF; From: %d, Len: %d, Size: %d", q.Off, q.Len, size)
	}
	if q.Flags&^valid != 0 {
		return fmt.Errorf("unsupported flags for command %s (got 0x%x)", nbdwire.CmdName(q.Cmd), q.Flags)
	}
	return nil
}

var errReadOnly = errors.New("Export is read-only")

// request serves q, whose header has been taken from the buffer. An error ends the connection.
func (c *conn) request(q *nbdwire.Request) error {
	c.eager = false
	if q.Len > nbdwire.MaxPayload && (q.Cmd == nbdwire.CmdRead || q.Cmd == nbdwire.CmdWrite || q.Cmd == nbdwire.CmdCache) {
		err := fmt.Errorf("len (%d ) is larger than max len (%d)", q.Len, nbdwire.MaxPayload)
		c.refuse(q, err)
		if q.Cmd != nbdwire.CmdWrite {
			return nil
		}
		// Nobody reads a payload of that size to keep the stream in order.
		c.flush()
		return err
	}
	if err := c.check(q); err != nil {
		if q.Cmd == nbdwire.CmdWrite {
			if int64(c.w-c.r) < int64(q.Len) {
				if err := c.flush(); err != nil {
					return err
				}
			}
			if err := c.skip(int64(q.Len)); err != nil {
				return err
			}
		}
		c.refuse(q, err)
		return nil
	}
	switch q.Cmd {
	case nbdwire.CmdRead:
		return c.read(q)
	case nbdwire.CmdWrite:
		return c.write(q)
	case nbdwire.CmdFlush, nbdwire.CmdTrim, nbdwire.CmdWriteZeroes:
		return c.control(q)
	case nbdwire.CmdCache:
		return c.dispatch(q, nil)
	case nbdwire.CmdBlockStatus:
		switch {
		case c.ctxs.count() == 0:
			c.refuse(q, errNoContext)
		case q.Len == 0:
			c.refuse(q, errZeroLength)
		default:
			return c.dispatch(q, nil)
		}
		return nil
	}
	c.refuse(q, fmt.Errorf("invalid request type (%d) received", q.Cmd))
	return nil
}

var (
	errNoContext  = errors.New("CMD_BLOCK_STATUS not negotiated")
	errZeroLength = errors.New("need non-zero length")
)

// read serves a read at once if that takes no waiting.
func (c *conn) read(q *nbdwire.Request) error {
	n := int(q.Len)
	if q.Flags&nbdwire.CmdFlagFUA != 0 {
		return c.dispatch(q, nil)
	}
	if n >= mapMin {
		if c.unix && c.readMapped(q) {
			return nil
		}
		return c.dispatch(q, nil)
	}
	head := nbdwire.SimpleSize
	if c.structured {
		head = nbdwire.DataHeadSize
	}
	c.reserve(head + n)
	r := c.enter()
	if r == nil {
		return c.dispatch(q, nil)
	}
	l := len(c.batch)
	r.NoWait = true
	var err error
	if n > 0 {
		err = c.dev.ReadAt(r, blk.Buf(c.batch[l+head:l+head+n:l+head+n]), int64(q.Off), 0)
	}
	r.NoWait = false
	c.leave()
	switch {
	case err == nil:
		c.batch = appendReadHead(c.batch, c.structured, q, n)
		c.batch = c.batch[:len(c.batch)+n]
	case errors.Is(err, blk.ErrWouldBlock):
		return c.dispatch(q, nil)
	default:
		c.fail(q, nbdwire.Errno(err), msgRead)
	}
	return nil
}

// appendReadHead appends what precedes the n bytes of data of an undivided read.
func appendReadHead(b []byte, structured bool, q *nbdwire.Request, n int) []byte {
	switch {
	case !structured:
		return nbdwire.AppendSimple(b, q.Cookie, 0)
	case n == 0:
		return nbdwire.AppendChunk(b, nbdwire.ChunkDone, nbdwire.ChunkNone, q.Cookie, 0)
	default:
		return nbdwire.AppendDataHead(b, nbdwire.ChunkDone, q.Cookie, q.Off, n)
	}
}

// overlapMin is the payload from which on a worker writes it while the connection takes the next one from the
// socket: two copies by two processors. Below, handing over costs more than it gains; so it does where the client and the connection
// keep all processors busy already (up to two of them): there the data are written at once, while they are in the cache.
const overlapMin = 256 << 10

// write serves a write at once if that takes no waiting; its payload is taken from the
// client in any case.
func (c *conn) write(q *nbdwire.Request) error {
	n := int(q.Len)
	var buf *blk.Buffer
	var data []byte
	if c.w-c.r >= n {
		data = c.in[c.r : c.r+n : c.r+n]
		c.r += n
	} else {
		// Whoever cannot send its payload before it got replies gets them.
		if err := c.flush(); err != nil {
			return err
		}
		if err := c.waitRoom(int64(n)); err != nil {
			return err
		}
		c.eager = n >= inSize/2
		buf = c.buffer(n)
		data = buf.B
		if err := c.readFull(data); err != nil {
			blk.PutBuf(buf)
			return err
		}
	}
	if n >= c.srv.overlap {
		return c.dispatchWrite(q, buf, data)
	}
	r := c.enter()
	if r == nil {
		return c.dispatchWrite(q, buf, data)
	}
	r.NoWait = true
	var err error
	if n > 0 {
		err = c.dev.WriteAt(r, blk.Buf(data), int64(q.Off), c.writeFlags(q))
	}
	r.NoWait = false
	c.leave()
	if errors.Is(err, blk.ErrWouldBlock) {
		return c.dispatchWrite(q, buf, data)
	}
	blk.PutBuf(buf)
	if err != nil {
		c.fail(q, nbdwire.Errno(err), msgWrite)
	} else {
		c.done(q)
	}
	return nil
}

// dispatchWrite hands a write to a worker, with data moved out of the input buffer.
func (c *conn) dispatchWrite(q *nbdwire.Request, buf *blk.Buffer, data []byte) error {
	if buf == nil {
		buf = blk.GetBuf(len(data), 0)
		copy(buf.B, data)
	}
	return c.dispatch(q, buf)
}

func (c *conn) writeFlags(q *nbdwire.Request) blk.Flags {
	var f blk.Flags
	if q.Flags&nbdwire.CmdFlagFUA != 0 || c.exp.spec.Writethrough {
		f |= blk.FUA
	}
	if q.Cmd == nbdwire.CmdWriteZeroes {
		if q.Flags&nbdwire.CmdFlagNoHole == 0 {
			f |= blk.MayUnmap
		}
		if q.Flags&nbdwire.CmdFlagFastZero != 0 {
			f |= blk.NoFallback
		}
	}
	return f
}

// control serves a flush, trim or write-zeroes at once if that takes no waiting.
func (c *conn) control(q *nbdwire.Request) error {
	r := c.enter()
	if r == nil {
		return c.dispatch(q, nil)
	}
	r.NoWait = true
	// A trim with FUA is two operations; the second may turn out to wait when the first is done.
	err := blk.ErrWouldBlock
	var msg string
	if q.Cmd != nbdwire.CmdTrim || q.Flags&nbdwire.CmdFlagFUA == 0 {
		msg, err = c.doControl(r, q)
	}
	r.NoWait = false
	c.leave()
	switch {
	case err == nil:
		c.done(q)
	case errors.Is(err, blk.ErrWouldBlock):
		return c.dispatch(q, nil)
	default:
		c.fail(q, nbdwire.Errno(err), msg)
	}
	return nil
}

// doControl performs a flush, trim or write-zeroes.
func (c *conn) doControl(r *blk.Req, q *nbdwire.Request) (msg string, err error) {
	off, n := int64(q.Off), int64(q.Len)
	switch q.Cmd {
	case nbdwire.CmdFlush:
		return msgFlush, c.dev.Flush(r)
	case nbdwire.CmdTrim:
		err := c.dev.Discard(r, off, n)
		if err == nil && q.Flags&nbdwire.CmdFlagFUA != 0 {
			err = c.dev.Flush(r)
		}
		return msgTrim, err
	default:
		return msgWrite, c.dev.Zero(r, off, n, c.writeFlags(q))
	}
}
