package file

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// maxIov is how many buffers go into one system call; the kernel's own limit is 1024.
const maxIov = 64

// xfer is one preadv2 or pwritev2 call over the part of v from byte skip on; trap is its
// number. It allocates nothing.
func xfer(trap uintptr, fd int, v blk.Vec, skip, off int64, flags uintptr) (int64, error) {
	var iov [maxIov]unix.Iovec
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
	if k == 0 {
		return 0, nil
	}
	// The offset is split in two longs; on 64-bit hosts the upper one is ignored.
	n, _, e := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(k),
		uintptr(off), uintptr(uint64(off)>>32), flags)
	if e != 0 {
		return 0, e
	}
	return int64(n), nil
}

// readFull fills v from off; what lies behind the end of the file reads as zeroes.
func (d *disk) readFull(fd int, v blk.Vec, off int64) error {
	want := v.Len()
	for done := int64(0); done < want; {
		var n int64
		var err error
		if b, ok := v.Single(); ok {
			var k int
			k, err = unix.Pread(fd, b[done:], off+done)
			n = int64(k)
		} else {
			n, err = xfer(unix.SYS_PREADV2, fd, v, done, off+done, 0)
		}
		switch {
		case err == unix.EINTR:
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
func writeFull(fd int, v blk.Vec, off int64, flags uintptr) error {
	want := v.Len()
	for done := int64(0); done < want; {
		var n int64
		var err error
		if b, ok := v.Single(); ok && flags == 0 {
			var k int
			k, err = unix.Pwrite(fd, b[done:], off+done)
			n = int64(k)
		} else {
			n, err = xfer(unix.SYS_PWRITEV2, fd, v, done, off+done, flags)
		}
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0: // a device at its end
			return unix.ENOSPC
		}
		done += n
	}
	return nil
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
	if err := d.enter(r); err != nil {
		return err
	}
	defer d.leave()
	return d.readFull(h.fd, v, off)
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
	if err := d.enter(r); err != nil {
		return err
	}
	defer d.leave()
	if f&blk.FUA != 0 && !d.memory {
		if err := d.writeSync(h, v, off); err != nil {
			return err
		}
	} else {
		start := time.Now()
		if err := writeFull(h.fd, v, off, 0); err != nil {
			return err
		}
		d.pace.note(time.Since(start))
	}
	d.grow(end)
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
	err := writeFull(h.fd, v, off, 0)
	d.pace.end(time.Since(start))
	return err
}

// writeSync writes with FUA.
func (d *disk) writeSync(h *handle, v blk.Vec, off int64) error {
	if e := d.lostErrno(); e != 0 {
		return e
	}
	if d.dsync.Load() {
		err := writeFull(h.fd, v, off, unix.RWF_DSYNC)
		if err == nil {
			return nil
		}
		if err == unix.EOPNOTSUPP || err == unix.EINVAL {
			d.dsync.Store(false)
		} else {
			// Either the write failed or the sync after it. If it can be repeated alone, it was
			// the sync, and that error is not to be forgotten.
			if werr := writeFull(h.fd, v, off, 0); werr == nil {
				d.remember(err)
			}
			return err
		}
	}
	if err := writeFull(h.fd, v, off, 0); err != nil {
		return err
	}
	return d.sync(h)
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
	if err := d.enter(r); err != nil {
		return err
	}
	defer d.leave()
	return d.sync(h)
}

func (d *disk) sync(h *handle) error {
	if e := d.lostErrno(); e != 0 {
		return e
	}
	for {
		err := d.fdatasync(h.fd)
		switch {
		case err == nil:
			return nil
		case err == unix.EINTR:
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
