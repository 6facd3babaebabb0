package fuse

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/export"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// A reader's buffer. The request is read in such a place that the data of a write begin at dataAt.
//
//	0        headAt                    dataAt
//	| unused | inHeaderSize, rwArgSize | data of a write, maxData
//	         | other requests ...
//	         | unused | outHeaderSize  | data of a read
const (
	dataAt  = pageSize
	headAt  = dataAt - inHeaderSize - rwArgSize
	bufSize = dataAt + maxData
)

// reader reads requests and serves them, one at a time. It lives in one goroutine, to which all its
// fields belong.
type reader struct {
	*server
	buf   *blk.Buffer
	reply []byte // small replies, behind room for their head
	q     request
	io    ioArg
	alloc allocArg
	seek  seekArg
	pipe  pipe
	sent  bool // the request is answered
	// unit is the unit of work of the request that is being served.
	unit *blk.Req
}

func newReader(s *server) *reader {
	return &reader{server: s, buf: blk.GetBuf(bufSize, pageSize), reply: make([]byte, outHeaderSize, 160)}
}

// end gives back what the reader has.
func (r *reader) end() {
	r.pipe.close()
	if r.unit == nil { // else, after a panic, the device may still use it
		blk.PutBuf(r.buf)
	}
}

// run serves requests until the connection is over, or there are readers enough without this one.
func (r *reader) run() {
	for {
		n, err := unix.Read(r.dev, r.buf.B[headAt:])
		r.idle.Add(-1)
		switch err {
		case nil:
			if n == 0 {
				return
			}
			r.serve(r.buf.B[headAt : headAt+n])
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // the request was taken back
		case unix.ENODEV:
			return
		default:
			r.log.Error("FUSE requests cannot be read any more", "export", r.export.Options.ID, "err", err)
			return
		}
		if r.idle.Add(1) > spareReaders {
			r.idle.Add(-1)
			return
		}
	}
}

// serve serves one request, as read.
func (r *reader) serve(b []byte) {
	q := &r.q
	r.sent = false
	if err := q.parse(b); err != nil {
		r.log.Error("FUSE request is ignored", "export", r.export.Options.ID, "err", err)
		return
	}
	if !r.enter() {
		r.fail(syscall.ENOTCONN)
		return
	}
	defer r.leave()
	defer panics.Catch("a FUSE request", func(err error) { r.fail(blk.Errno(err)) })
	switch q.op {
	case opForget, opBatchForget, opInterrupt: // want no reply
	case opInit:
		r.init()
	case opGetattr:
		r.getattr()
	case opSetattr:
		r.setattr()
	case opOpen:
		r.open()
	case opRead, opWrite, opFlush, opFsync, opFallocate, opLseek:
		r.device()
	case opStatfs:
		r.send(appendStatfs(r.reply[:outHeaderSize]))
	case opLookup:
		r.fail(syscall.ENOENT)
	case opRelease, opDestroy:
		r.fail(0)
	default:
		r.fail(syscall.ENOSYS)
	}
}

// fail answers with an errno alone; 0 is success.
func (r *reader) fail(errno syscall.Errno) {
	putHead(r.reply[:outHeaderSize], r.q.unique, errno, 0)
	r.write(r.reply[:outHeaderSize])
}

// send answers with b, which has room for the head at its beginning.
func (r *reader) send(b []byte) {
	putHead(b, r.q.unique, 0, len(b)-outHeaderSize)
	r.write(b)
}

// write sends a reply. Nobody may wait for it any more: that is no error. Somebody who does gets an
// error in place of a reply that the kernel does not take.
func (r *reader) write(b []byte) {
	_, err := unix.Write(r.dev, b)
	if err == nil || err == unix.ENOENT || err == unix.ENODEV {
		return
	}
	r.log.Error("FUSE reply failed", "export", r.export.Options.ID, "request", int(r.q.op), "err", err)
	if len(b) > outHeaderSize {
		r.fail(syscall.EIO)
	}
}

// device serves a request to the device and answers it.
func (r *reader) device() {
	err := r.parseArg()
	if err == nil && !r.writable && (r.q.op == opWrite || r.q.op == opFallocate) {
		err = syscall.EACCES
	}
	if err != nil {
		r.fail(answerErrno(err))
		return
	}
	errs := r.export.Errors
	err = blk.ErrWouldBlock
	if errs.Stopped() == nil && r.export.Workers() == nil && r.q.op != opFallocate {
		err = r.atOnce()
	}
	if errors.Is(err, blk.ErrWouldBlock) || errs.Covers(r.operation(), err) {
		r.moreReaders()
		err = r.patiently()
	}
	if err != nil {
		r.fail(answerErrno(err))
	}
}

// parseArg takes apart the argument of a request to the device.
func (r *reader) parseArg() error {
	switch r.q.op {
	case opRead:
		return r.io.parse(r.q.arg, false)
	case opWrite:
		return r.io.parse(r.q.arg, true)
	case opFallocate:
		return r.alloc.parse(r.q.arg)
	case opLseek:
		return r.seek.parse(r.q.arg)
	}
	return nil
}

// answerErrno is what the kernel is told about an error.
func answerErrno(err error) syscall.Errno {
	switch {
	case errors.Is(err, blk.ErrNotSupported):
		return syscall.EOPNOTSUPP
	case errors.Is(err, blk.ErrOutOfRange), errors.Is(err, errShort):
		return syscall.EIO
	case errors.Is(err, blk.ErrClosed):
		return syscall.ENOTCONN
	}
	return blk.Errno(err)
}

// operation is what the request counts as among errors.
func (r *reader) operation() types.IoOperationType {
	if r.q.op == opRead || r.q.op == opLseek {
		return types.IoOperationTypeRead
	}
	return types.IoOperationTypeWrite
}

// atOnce serves the request if that takes no waiting, else nothing has happened.
func (r *reader) atOnce() error {
	u := r.root.TryBegin()
	if u == nil {
		return blk.ErrWouldBlock
	}
	u.NoWait = true
	r.unit = u
	err := r.perform()
	r.unit, u.NoWait = nil, false
	r.root.End(u)
	if err == nil {
		r.answer()
	}
	return err
}

// patiently serves the request. Errors of the device are what the export says; where one stops it,
// the request is performed again when it goes on.
func (r *reader) patiently() error {
	errs := r.export.Errors
	for {
		if over := errs.Stopped(); over != nil {
			select {
			case <-over:
			case <-r.ctx.Done():
				return blk.ErrClosed
			}
		}
		resumes := errs.Resumes()
		err := r.attempt()
		if err == nil {
			r.answer()
			return nil
		}
		switch errs.Decide(r.operation(), err, resumes) {
		case types.BlockErrorActionReport:
			return err
		case types.BlockErrorActionIgnore:
			r.ignore()
			return nil
		}
	}
}

// attempt performs the request, with what has to come before.
func (r *reader) attempt() error {
	if r.q.op == opFallocate {
		return r.allocate()
	}
	for {
		err := r.grow()
		if err == nil {
			err = r.inUnit(r.perform)
		}
		if err != blk.ErrWouldBlock {
			return err
		}
	}
}

// inUnit calls do in a unit of work, for which it waits.
func (r *reader) inUnit(do func() error) error {
	u, err := export.Begin(r.ctx, r.root, r.export.Workers)
	if err != nil {
		return err
	}
	r.unit = u.Req
	err = do()
	r.unit = nil
	u.End()
	return err
}
