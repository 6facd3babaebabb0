package file

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// maxIov is how many buffers go into one system call; the kernel's own limit is 1024.
const maxIov = 64

// fillIov describes the part of v from byte skip on, as far as it fits, and returns the number of
// entries.
func fillIov(iov *[maxIov]unix.Iovec, v blk.Vec, skip int64) int {
	k := 0
	v.Each(func(b []byte) {
		if skip >= int64(len(b)) {
			skip -= int64(len(b))
			return
		}
		if k < maxIov {
			b = b[skip:]
			iov[k].Base = &b[0]
			iov[k].SetLen(len(b))
			k++
		}
		skip = 0
	})
	return k
}

// xfer is one preadv2 or pwritev2 call over the part of v from byte skip on; trap is its
// number. It allocates nothing.
func xfer(trap uintptr, fd int, v blk.Vec, skip, off int64, flags uintptr) (int64, error) {
	if b, ok := v.Single(); ok && skip < int64(len(b)) {
		one := unix.Iovec{Base: &b[skip]}
		one.SetLen(len(b) - int(skip))
		return iocall(trap, fd, &one, 1, off, flags)
	}
	var iov [maxIov]unix.Iovec
	k := fillIov(&iov, v, skip)
	if k == 0 {
		return 0, nil
	}
	return iocall(trap, fd, &iov[0], k, off, flags)
}

func iocall(trap uintptr, fd int, iov *unix.Iovec, k int, off int64, flags uintptr) (int64, error) {
	// The offset is split in two longs; on 64-bit hosts the upper one is ignored.
	n, _, e := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(iov)), uintptr(k),
		uintptr(off), uintptr(uint64(off)>>32), flags)
	if e != 0 {
		return 0, e
	}
	return int64(n), nil
}

// readSome reads into a part of v from byte done on: by the engine, or without one by a blocking
// call.
func (e *engine) readSome(r *blk.Req, fd int, v blk.Vec, done, off int64) (int64, error) {
	if e != nil {
		n, err := e.do(r, opRead, fd, v, done, off+done, 0)
		if err != unix.ECANCELED || cancelled(r) {
			return n, err
		}
		// The thread that submitted it ended; the request did not.
	}
	if b, ok := v.Single(); ok {
		n, err := unix.Pread(fd, b[done:], off+done)
		return int64(n), err
	}
	return xfer(unix.SYS_PREADV2, fd, v, done, off+done, 0)
}

// writeSome is the same for writes.
func (e *engine) writeSome(r *blk.Req, fd int, v blk.Vec, done, off int64, flags uintptr) (int64, error) {
	if e != nil {
		n, err := e.do(r, opWrite, fd, v, done, off+done, uint32(flags))
		if err != unix.ECANCELED || cancelled(r) {
			return n, err
		}
	}
	return pwriteSome(fd, v, done, off, flags)
}

func pwriteSome(fd int, v blk.Vec, done, off int64, flags uintptr) (int64, error) {
	if b, ok := v.Single(); ok && flags == 0 {
		n, err := unix.Pwrite(fd, b[done:], off+done)
		return int64(n), err
	}
	return xfer(unix.SYS_PWRITEV2, fd, v, done, off+done, flags)
}

func cancelled(r *blk.Req) bool { return r.Ctx != nil && r.Ctx.Err() != nil }

// readFull fills v from off; what lies behind the end of the file reads as zeroes.
func (d *disk) readFull(r *blk.Req, fd int, v blk.Vec, off int64) error {
	want := v.Len()
	for done := int64(0); done < want; {
		n, err := d.engine.readSome(r, fd, v, done, off)
		switch {
		case err == unix.EINTR, err == unix.EAGAIN:
			continue
		case err != nil:
			return err
		case n == 0, d.direct && n%d.limits.RequestAlign != 0: // O_DIRECT cannot ask again from there
			zeroFrom(v, done+n)
			return nil
		}
		done += n
	}
	return nil
}

// zeroFrom clears v from byte skip on.
func zeroFrom(v blk.Vec, skip int64) {
	v.Each(func(b []byte) {
		if skip >= int64(len(b)) {
			skip -= int64(len(b))
			return
		}
		clear(b[skip:])
		skip = 0
	})
}

// writeFull writes all of v to off with the given RWF flags.
func (d *disk) writeFull(r *blk.Req, fd int, v blk.Vec, off int64, flags uintptr) error {
	want := v.Len()
	for done := int64(0); done < want; {
		n, err := d.engine.writeSome(r, fd, v, done, off, flags)
		n, err = wrote(done, n, err)
		if err != nil {
			if done > 0 {
				d.grow(off + done) // the file has what was written so far
			}
			return err
		}
		done = n
	}
	return nil
}

// pwriteFull is writeFull by blocking calls without flags.
func pwriteFull(fd int, v blk.Vec, off int64) error {
	want := v.Len()
	for done := int64(0); done < want; {
		n, err := pwriteSome(fd, v, done, off, 0)
		if done, err = wrote(done, n, err); err != nil {
			return err
		}
	}
	return nil
}

// wrote is how far a write has come after a call that wrote n bytes or failed.
func wrote(done, n int64, err error) (int64, error) {
	switch {
	case err == unix.EINTR, err == unix.EAGAIN:
		return done, nil
	case err == nil && n == 0: // a device at its end
		return done, unix.ENOSPC
	}
	return done + n, err
}

// ReadAt implements graph.Driver. Bytes between the end of the file and Size read as zeroes.
func (d *disk) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	defer h.drop()
	if r.NoWait && !d.memory {
		return d.readNoWait(h, v, off)
	}
	if d.engine == nil {
		if err := d.enter(r); err != nil {
			return err
		}
		defer d.leave()
	}
	return d.readFull(r, h.fd, v, off)
}

// readNoWait serves cached bytes only.
func (d *disk) readNoWait(h *handle, v blk.Vec, off int64) error {
	if d.direct || !d.nowaitRead.Load() {
		return blk.ErrWouldBlock
	}
	n, err := xfer(unix.SYS_PREADV2, h.fd, v, 0, off, unix.RWF_NOWAIT)
	switch {
	case err == nil && n == v.Len():
		return nil
	case err == nil && off+n >= d.eof.Load():
		zeroFrom(v, n)
		return nil
	case err == unix.EOPNOTSUPP, err == unix.EINVAL, err == unix.ENOSYS:
		d.nowaitRead.Store(false)
	}
	return blk.ErrWouldBlock // also after other errors: the worker will meet and report them
}

// WriteAt implements graph.Writer; it grows the file where the range passes its end.
func (d *disk) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	defer h.drop()
	end := off + v.Len()
	if r.NoWait && !d.memory {
		if d.direct || f&blk.FUA != 0 || end > d.eof.Load() {
			return blk.ErrWouldBlock
		}
		return d.writeNoWait(h, v, off)
	}
	if d.engine == nil {
		if err := d.enter(r); err != nil {
			return err
		}
		defer d.leave()
	}
	if f&blk.FUA != 0 && !d.memory {
		if err := d.writeSync(r, h, v, off); err != nil {
			return err
		}
	} else {
		start := time.Now()
		if err := d.writeFull(r, h.fd, v, off, 0); err != nil {
			return err
		}
		d.pace.note(time.Since(start))
	}
	d.grow(end)
	d.wrote(r, h, v.Len())
	return nil
}

// writeNoWait overwrites within the file, by the rule in the package doc.
func (d *disk) writeNoWait(h *handle, v blk.Vec, off int64) error {
	if d.nowaitWrite.Load() {
		n, err := xfer(unix.SYS_PWRITEV2, h.fd, v, 0, off, unix.RWF_NOWAIT)
		switch {
		case err == nil && n == v.Len():
			return nil
		case err == unix.EOPNOTSUPP, err == unix.EINVAL, err == unix.ENOSYS:
			d.nowaitWrite.Store(false)
		default:
			// A part may be written: it belongs to this same request, which a worker repeats whole.
			return blk.ErrWouldBlock
		}
	}
	if v.Len() > inlineMax || !d.pace.begin() {
		return blk.ErrWouldBlock
	}
	start := time.Now()
	err := pwriteFull(h.fd, v, off)
	d.pace.end(time.Since(start))
	return err
}

// writeSync writes with FUA.
func (d *disk) writeSync(r *blk.Req, h *handle, v blk.Vec, off int64) error {
	if e := d.lostErrno(); e != 0 {
		return e
	}
	if d.dsync.Load() {
		err := d.writeFull(r, h.fd, v, off, unix.RWF_DSYNC)
		if err == nil {
			return nil
		}
		if err == unix.EOPNOTSUPP || err == unix.EINVAL {
			d.dsync.Store(false)
		} else {
			// Either the write failed or the sync after it. If it can be repeated alone, it was
			// the sync, and that error is not to be forgotten.
			if werr := d.writeFull(r, h.fd, v, off, 0); werr == nil {
				d.remember(err)
			}
			return err
		}
	}
	if err := d.writeFull(r, h.fd, v, off, 0); err != nil {
		return err
	}
	return d.sync(r, h)
}

// Flush implements graph.Flusher. After a failed sync of cached data it fails for good: the
// kernel may have marked pages clean that never reached the disk, and a later sync would
// report a success that is none. O_DIRECT has no such pages.
func (d *disk) Flush(r *blk.Req) error {
	if d.memory {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	defer h.drop()
	if d.engine == nil || !d.engine.q.syncs() {
		if err := d.enter(r); err != nil {
			return err
		}
		defer d.leave()
	}
	return d.sync(r, h)
}

func (d *disk) sync(r *blk.Req, h *handle) error {
	if e := d.lostErrno(); e != 0 {
		return e
	}
	for {
		var err error
		if d.engine != nil && d.engine.q.syncs() {
			_, err = d.engine.do(r, opSync, h.fd, blk.Vec{}, 0, 0, 0)
			if err == unix.ECANCELED {
				if cancelled(r) {
					return err
				}
				err = d.fdatasync(h.fd)
			}
		} else {
			err = d.fdatasync(h.fd)
		}
		switch {
		case err == nil:
			return nil
		case err == unix.EINTR, err == unix.EAGAIN:
			continue
		case d.device && (err == unix.EINVAL || err == unix.EROFS):
			return nil // a character device without anything to sync
		}
		d.remember(err)
		return err
	}
}

// remember makes all further syncs fail with err, unless the page cache is not in use.
func (d *disk) remember(err error) {
	if !d.direct {
		d.lost.CompareAndSwap(0, uint32(blk.Errno(err)))
	}
}

func (d *disk) lostErrno() unix.Errno { return unix.Errno(d.lost.Load()) }
