package nbd

import (
	"errors"
	"fmt"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// session is what client and server have agreed on, and what requests do to the device by it. It is
// constant during transmission: it has no lock.
type session struct {
	exp  *Export // nil until the handshake is over
	dev  Device  // of exp
	form nbdwire.Form
	ctxs []*metaContext // of exp that the client has chosen, by their ids
}

// What is said about requests that were refused by the device.
const (
	msgRead  = "reading from file failed"
	msgWrite = "writing to file failed"
	msgFlush = "flush failed"
	msgTrim  = "discard failed"

	msgInternal  = "internal error"
	msgUnstarted = "request was not started"
	msgCache     = "caching data failed"
	msgStatus    = "can't get block status"
)

var (
	errReadOnly   = errors.New("Export is read-only")
	errNoContext  = errors.New("CMD_BLOCK_STATUS not negotiated")
	errZeroLength = errors.New("need non-zero length")
	errContexts   = errors.New("CMD_BLOCK_STATUS payload not valid")
)

// check tells what is wrong with q by itself, in QEMU's words; the payload of a
// write is not looked at. All these errors are EINVAL on the wire.
func (s *session) check(q *nbdwire.Request) error {
	valid := nbdwire.CmdFlagFUA
	writes, known := false, true
	switch q.Cmd {
	case nbdwire.CmdRead:
		if s.form != nbdwire.Simple {
			valid |= nbdwire.CmdFlagDF
		}
	case nbdwire.CmdWrite:
		valid |= s.payloadFlag()
		writes = true
	case nbdwire.CmdTrim:
		writes = true
	case nbdwire.CmdWriteZeroes:
		valid |= nbdwire.CmdFlagNoHole | nbdwire.CmdFlagFastZero
		writes = true
	case nbdwire.CmdBlockStatus:
		valid |= nbdwire.CmdFlagReqOne | s.payloadFlag()
	case nbdwire.CmdFlush, nbdwire.CmdCache:
	default:
		known = false
	}
	if writes && s.exp.spec.ReadOnly {
		return errReadOnly
	}
	size := uint64(s.exp.spec.Size)
	if q.Off > size || uint64(q.Len) > size-q.Off {
		return fmt.Errorf("operation past EOF; From: %d, Len: %d, Size: %d", q.Off, q.Len, size)
	}
	if q.Flags&^valid != 0 {
		return fmt.Errorf("unsupported flags for command %s (got 0x%x)", nbdwire.CmdName(q.Cmd), q.Flags)
	}
	switch {
	case !known:
		return fmt.Errorf("invalid request type (%d) received", q.Cmd)
	case q.Cmd == nbdwire.CmdBlockStatus && len(s.ctxs) == 0:
		return errNoContext
	case q.Cmd == nbdwire.CmdBlockStatus && q.Len == 0:
		return errZeroLength
	}
	return nil
}

// payloadFlag is the flag that tells of a payload, where there is one.
func (s *session) payloadFlag() uint16 {
	if s.form == nbdwire.Extended {
		return nbdwire.CmdFlagPayload
	}
	return 0
}

// payload is how many bytes follow q.
func (s *session) payload(q *nbdwire.Request) uint64 {
	if q.Cmd == nbdwire.CmdWrite || q.Flags&s.payloadFlag() != 0 {
		return q.Len
	}
	return 0
}

// badPayload tells what is wrong with q, whose payload has been dropped.
func (s *session) badPayload(q *nbdwire.Request) error {
	q.Len = 0
	if err := s.check(q); err != errZeroLength {
		return err
	}
	return errContexts
}

// isBounded tells whether a request of this kind, without a payload, may be no longer than
// MaxPayload.
func (s *session) isBounded(cmd uint16) bool {
	return cmd == nbdwire.CmdRead || cmd == nbdwire.CmdCache && s.form != nbdwire.Extended
}

// flags are those of a write or write-zeroes.
func (s *session) flags(q *nbdwire.Request) blk.Flags {
	var f blk.Flags
	if q.Flags&nbdwire.CmdFlagFUA != 0 || s.exp.spec.Writethrough {
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

// cost is what q's data take while it is under way.
func (s *session) cost(q *nbdwire.Request) int64 {
	switch q.Cmd {
	case nbdwire.CmdRead, nbdwire.CmdWrite:
		return int64(q.Len)
	case nbdwire.CmdBlockStatus:
		return int64(len(s.ctxs)) * maxExtents * int64(s.form.ExtentSize())
	}
	return 0
}

// appendReadHead appends what precedes the n bytes of data of an undivided read.
func (s *session) appendReadHead(b []byte, q *nbdwire.Request, n int) []byte {
	if s.form == nbdwire.Simple || n == 0 {
		return s.form.AppendSuccess(b, q)
	}
	return s.form.AppendDataHead(b, nbdwire.ChunkDone, q, q.Off, n)
}

// done makes the reply to a request that has succeeded and has no data.
func (s *session) done(q *nbdwire.Request) *reply {
	p := newReply()
	p.head = s.form.AppendSuccess(p.head, q)
	return p
}

// failure makes an error reply.
func (s *session) failure(q *nbdwire.Request, errno uint32, msg string) *reply {
	p := newReply()
	p.head = s.form.AppendError(p.head, q, errno, msg)
	return p
}

// fault makes the reply to a request that the device has failed. Where nothing but speed is lost no
// policy is asked.
func (s *session) fault(q *nbdwire.Request, err error, msg string) *reply {
	p := s.failure(q, nbdwire.Errno(err), msg)
	if q.Cmd != nbdwire.CmdCache {
		p.fault = err
	}
	return p
}

// success makes the reply to a request whose failure is to be ignored: reads get zeroes.
func (s *session) success(q *nbdwire.Request) *reply {
	if q.Cmd != nbdwire.CmdRead {
		return s.done(q)
	}
	p := newReply()
	n := int(q.Len)
	p.head = s.appendReadHead(p.head, q, n)
	p.buf = s.exp.srv.buffer(n)
	p.data = p.buf.B
	clear(p.data)
	return p
}

// perform does what j asks for in the unit of work u, and makes its reply.
func (s *session) perform(u *blk.Req, j *job) *reply {
	q := &j.q
	var err error
	msg := msgWrite
	switch q.Cmd {
	case nbdwire.CmdRead:
		return s.serveRead(u, q)
	case nbdwire.CmdBlockStatus:
		return s.serveStatus(u, q, j.ctxs)
	case nbdwire.CmdWrite:
		err = s.dev.WriteAt(u, blk.Buf(j.buf.B), int64(q.Off), s.flags(q))
	default:
		msg, err = s.doControl(u, q)
	}
	if err != nil {
		return s.fault(q, err, msg)
	}
	return s.done(q)
}

// doControl performs a flush, trim, cache or write-zeroes.
func (s *session) doControl(r *blk.Req, q *nbdwire.Request) (msg string, err error) {
	off, n := int64(q.Off), int64(q.Len)
	switch q.Cmd {
	case nbdwire.CmdFlush:
		return msgFlush, s.dev.Flush(r)
	case nbdwire.CmdTrim:
		err := s.dev.Discard(r, off, n)
		if err == nil && q.Flags&nbdwire.CmdFlagFUA != 0 {
			err = s.dev.Flush(r)
		}
		return msgTrim, err
	case nbdwire.CmdCache:
		return msgCache, s.dev.Prefetch(r, off, n)
	default:
		return msgWrite, s.dev.Zero(r, off, n, s.flags(q))
	}
}

// serveRead reads; with structured replies and where it may be worth it, holes are told
// as such, as block-status finds them.
func (s *session) serveRead(r *blk.Req, q *nbdwire.Request) *reply {
	n := int(q.Len)
	if q.Flags&nbdwire.CmdFlagFUA != 0 {
		if err := s.dev.Flush(r); err != nil {
			return s.fault(q, err, msgFlush)
		}
	}
	if s.form != nbdwire.Simple && q.Flags&nbdwire.CmdFlagDF == 0 && n >= mapMin {
		return s.serveSparse(r, q)
	}
	p := newReply()
	p.head = s.appendReadHead(p.head, q, n)
	if n == 0 {
		return p
	}
	p.buf = s.exp.srv.buffer(n)
	if err := s.dev.ReadAt(r, blk.Buf(p.buf.B), int64(q.Off), 0); err != nil {
		blk.PutBuf(p.buf)
		p.buf = nil
		p.head = s.form.AppendError(p.head[:0], q, nbdwire.Errno(err), msgRead)
		p.fault = err
		return p
	}
	p.data = p.buf.B
	return p
}

// serveSparse answers a read in chunks of data and holes.
func (s *session) serveSparse(r *blk.Req, q *nbdwire.Request) *reply {
	c := chunks{form: s.form, q: q, off: int64(q.Off), end: int64(q.Off) + int64(q.Len), first: newReply()}
	c.last = c.first
	for c.off < c.end {
		zero, known, n, err := s.run(r, c.off, c.end)
		if err != nil {
			return c.fail(err, "unable to check for holes: "+blk.ErrnoText(err))
		}
		if zero {
			c.hole(n)
			continue
		}
		buf := s.exp.srv.buffer(int(n))
		if err := s.dev.ReadAt(r, blk.Buf(buf.B), c.off, 0); err != nil {
			blk.PutBuf(buf)
			return c.fail(err, msgRead)
		}
		if known {
			c.data(buf.B)
		} else {
			c.content(buf.B)
		}
		c.last.buf = buf
	}
	return c.first
}

// run is the n bytes from off on, at most up to end, that are known to be zeroes or are not. To
// find that out must not take another request to where the disk lies: then known is false.
func (s *session) run(r *blk.Req, off, end int64) (zero, known bool, n int64, err error) {
	r.NoWait = true
	defer func() { r.NoWait = false }()
	x, err := s.status(r, off, end-off)
	if errors.Is(err, blk.ErrWouldBlock) {
		return false, false, end - off, nil
	}
	if err != nil {
		return false, false, 0, err
	}
	zero, n = x.Zero, x.N
	// Status answers in the units of each layer: join what belongs together.
	for off+n < end {
		if x, err = s.status(r, off+n, end-off-n); err != nil || x.Zero != zero {
			break // an error shows again
		}
		n += x.N
	}
	return zero, true, n, nil
}

// status is Device.Status where the end of a device that became shorter is an error.
func (s *session) status(r *blk.Req, off, n int64) (blk.Extent, error) {
	x, err := s.dev.Status(r, off, n)
	if err == nil && x.N <= 0 {
		err = blk.ErrOutOfRange
	}
	return x, err
}
