package nbd

import (
	"errors"
	"fmt"

	"qblockd/blockdev/nbd/wire"
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
// write is not looked at. All these errors are EINVAL on the wire.
func (c *conn) check(q *wire.Request) error {
	valid := wire.CmdFlagFUA
	writes := false
	switch q.Cmd {
	case wire.CmdRead:
		if c.structured {
			valid |= wire.CmdFlagDF
		}
	case wire.CmdWrite, wire.CmdTrim:
		writes = true
	case wire.CmdWriteZeroes:
		valid |= wire.CmdFlagNoHole | wire.CmdFlagFastZero
		writes = true
	case wire.CmdBlockStatus:
		valid |= wire.CmdFlagReqOne
	}
	if writes && c.exp.spec.ReadOnly {
		return errReadOnly
	}
	size := uint64(c.exp.spec.Size)
	if q.Off > size || uint64(q.Len) > size-q.Off {
		return fmt.Errorf("operation past EOF; From: %d, Len: %d, Size: %d", q.Off, q.Len, size)
	}
	if q.Flags&^valid != 0 {
		return fmt.Errorf("unsupported flags for command %s (got 0x%x)", wire.CmdName(q.Cmd), q.Flags)
	}
	return nil
}

var errReadOnly = errors.New("Export is read-only")

// request serves q, whose header has been taken from the buffer. An error ends the connection.
func (c *conn) request(q *wire.Request) error {
	c.eager = false
	if q.Len > wire.MaxPayload && (q.Cmd == wire.CmdRead || q.Cmd == wire.CmdWrite || q.Cmd == wire.CmdCache) {
		err := fmt.Errorf("len (%d ) is larger than max len (%d)", q.Len, wire.MaxPayload)
		c.refuse(q, err)
		if q.Cmd != wire.CmdWrite {
			return nil
		}
		// Nobody reads a payload of that size to keep the stream in order.
		c.flush()
		return err
	}
	if err := c.check(q); err != nil {
		if q.Cmd == wire.CmdWrite {
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
	case wire.CmdRead:
		return c.read(q)
	case wire.CmdWrite:
		return c.write(q)
	case wire.CmdFlush, wire.CmdTrim, wire.CmdWriteZeroes:
		return c.control(q)
	case wire.CmdCache:
		return c.dispatch(q, nil)
	case wire.CmdBlockStatus:
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
func (c *conn) read(q *wire.Request) error {
	n := int(q.Len)
	if q.Flags&wire.CmdFlagFUA != 0 {
		return c.dispatch(q, nil)
	}
	if n >= mapMin {
		if c.unix && c.readMapped(q) {
			return nil
		}
		return c.dispatch(q, nil)
	}
	head := wire.SimpleSize
	if c.structured {
		head = wire.DataHeadSize
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
		c.fail(q, wire.Errno(err), msgRead)
	}
	return nil
}

// appendReadHead appends what precedes the n bytes of data of an undivided read.
func appendReadHead(b []byte, structured bool, q *wire.Request, n int) []byte {
	switch {
	case !structured:
		return wire.AppendSimple(b, q.Cookie, 0)
	case n == 0:
		return wire.AppendChunk(b, wire.ChunkDone, wire.ChunkNone, q.Cookie, 0)
	default:
		return wire.AppendDataHead(b, wire.ChunkDone, q.Cookie, q.Off, n)
	}
}

// overlapMin is the payload from which on a worker writes it while the connection takes the next one from the
// socket: two copies by two processors. Below, handing over costs more than it gains; so it does where the client and the connection
// keep all processors busy already (up to two of them): there the data are written at once, while they are in the cache.
const overlapMin = 256 << 10

// write serves a write at once if that takes no waiting; its payload is taken from the
// client in any case.
func (c *conn) write(q *wire.Request) error {
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
		c.fail(q, wire.Errno(err), msgWrite)
	} else {
		c.done(q)
	}
	return nil
}

// dispatchWrite hands a write to a worker, with data moved out of the input buffer.
func (c *conn) dispatchWrite(q *wire.Request, buf *blk.Buffer, data []byte) error {
	if buf == nil {
		buf = blk.GetBuf(len(data), 0)
		copy(buf.B, data)
	}
	return c.dispatch(q, buf)
}

func (c *conn) writeFlags(q *wire.Request) blk.Flags {
	var f blk.Flags
	if q.Flags&wire.CmdFlagFUA != 0 || c.exp.spec.Writethrough {
		f |= blk.FUA
	}
	if q.Cmd == wire.CmdWriteZeroes {
		if q.Flags&wire.CmdFlagNoHole == 0 {
			f |= blk.MayUnmap
		}
		if q.Flags&wire.CmdFlagFastZero != 0 {
			f |= blk.NoFallback
		}
	}
	return f
}

// control serves a flush, trim or write-zeroes at once if that takes no waiting.
func (c *conn) control(q *wire.Request) error {
	r := c.enter()
	if r == nil {
		return c.dispatch(q, nil)
	}
	r.NoWait = true
	// A trim with FUA is two operations; the second may turn out to wait when the first is done.
	err := blk.ErrWouldBlock
	var msg string
	if q.Cmd != wire.CmdTrim || q.Flags&wire.CmdFlagFUA == 0 {
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
		c.fail(q, wire.Errno(err), msg)
	}
	return nil
}

// doControl performs a flush, trim or write-zeroes.
func (c *conn) doControl(r *blk.Req, q *wire.Request) (msg string, err error) {
	off, n := int64(q.Off), int64(q.Len)
	switch q.Cmd {
	case wire.CmdFlush:
		return msgFlush, c.dev.Flush(r)
	case wire.CmdTrim:
		err := c.dev.Discard(r, off, n)
		if err == nil && q.Flags&wire.CmdFlagFUA != 0 {
			err = c.dev.Flush(r)
		}
		return msgTrim, err
	default:
		return msgWrite, c.dev.Zero(r, off, n, c.writeFlags(q))
	}
}
