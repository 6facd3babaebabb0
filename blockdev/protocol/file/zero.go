package file

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// Zero implements graph.Zeroer: without data transfer, or blk.ErrNotSupported.
func (d *disk) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	h, err := d.begin(r)
	if err != nil {
		return err
	}
	defer d.end(h)
	defer d.extent.Store(nil)
	if d.device {
		return d.zeroDevice(h, off, n, f)
	}
	err = d.zeroOrUnmap(h, off, n, f)
	var st unix.Stat_t
	if err != nil && !errors.Is(err, blk.ErrNotSupported) && unix.Fstat(h.fd, &st) == nil {
		d.grow(st.Size) // some file systems leave what they came to
	}
	return err
}

func (d *disk) zeroOrUnmap(h *handle, off, n int64, f blk.Flags) error {
	if f&blk.MayUnmap != 0 {
		err := d.unmap(h, off, n)
		if !errors.Is(err, blk.ErrNotSupported) {
			return err
		}
	}
	err := d.zeroFile(h, off, n)
	if err == nil {
		d.grow(off + n)
	}
	return err
}

// unmap makes a range a hole, growing the file over it where it passes the end.
func (d *disk) unmap(h *handle, off, n int64) error {
	err := d.punch(h, off, n)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBUSY):
		return blk.ErrNotSupported // file systems that want other alignments, busy swap files
	case err != nil:
		return err
	}
	if end := off + n; end > d.eof.Load() {
		// A hole does not move the end. Writing the last block does, and unlike ftruncate it
		// cannot cut off what a neighbour appends meanwhile.
		tail := min(n, d.limits.RequestAlign)
		if err := pwriteFull(h.fd, blk.Buf(alignedBuf(int(tail), d.limits.MemAlign)), end-tail); err != nil {
			return err
		}
		d.grow(end)
	}
	return nil
}

// zeroFile zeroes a range and keeps it allocated.
func (d *disk) zeroFile(h *handle, off, n int64) error {
	if d.canZero.Load() {
		err := fallocate(h.fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
		switch {
		case errors.Is(err, blk.ErrNotSupported):
			d.canZero.Store(false)
		case !errors.Is(err, unix.EINVAL): // EINVAL: wants another alignment, try what follows
			return err
		}
	}
	if d.canAllocate.Load() {
		err := d.punch(h, off, n)
		switch {
		case err == nil:
			return d.allocate(h, off, n)
		case !errors.Is(err, blk.ErrNotSupported) && !errors.Is(err, unix.EINVAL):
			return err
		}
	}
	if off >= d.eof.Load() && d.canAllocate.Load() {
		return d.allocate(h, off, n) // new blocks are zero
	}
	return blk.ErrNotSupported
}

// zeroDevice zeroes a range of a block device.
func (d *disk) zeroDevice(h *handle, off, n int64, f blk.Flags) error {
	if !d.block {
		return blk.ErrNotSupported
	}
	if f&blk.MayUnmap != 0 {
		// The kernel does this only where it is done by the device, and drops cached pages.
		err := d.punch(h, off, n)
		if !errors.Is(err, blk.ErrNotSupported) && !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	// What is left may be done by writing zeroes, behind our back.
	if f&blk.NoFallback != 0 || !d.canZero.Load() {
		return blk.ErrNotSupported
	}
	var err error
	if d.direct {
		err = blockIoctl(h.fd, unix.BLKZEROOUT, off, n)
	} else {
		err = fallocate(h.fd, unix.FALLOC_FL_ZERO_RANGE, off, n) // unlike BLKZEROOUT safe for cached pages
	}
	if errors.Is(err, blk.ErrNotSupported) {
		d.canZero.Store(false)
	}
	if errors.Is(err, unix.EINVAL) {
		return blk.ErrNotSupported // smaller than the device's sectors
	}
	return err
}

// Discard implements graph.Discarder and counts for DriverStats.
func (d *disk) Discard(r *blk.Req, off, n int64) error {
	h, err := d.begin(r)
	if err != nil {
		return err
	}
	defer d.end(h)
	defer d.extent.Store(nil)
	if err := d.discard(h, off, n); err != nil {
		d.discardErr.Add(1)
		return err
	}
	d.discardOK.Add(1)
	d.discardN.Add(n)
	return nil
}

func (d *disk) discard(h *handle, off, n int64) error {
	switch {
	case !d.device:
		return d.punch(h, off, n)
	case !d.block || !d.canPunch.Load():
		return blk.ErrNotSupported
	}
	// Whole sectors only; what is left over at the ends stays, which is a discard's right.
	a := max(d.limits.DiscardAlign, 1)
	start, end := blk.AlignUp(off, a), (off+n)&^(a-1)
	if start >= end {
		return nil
	}
	err := blockIoctl(h.fd, unix.BLKDISCARD, start, end-start)
	if errors.Is(err, blk.ErrNotSupported) {
		d.canPunch.Store(false)
	}
	return err
}

// abilities are what the file system was found to take; each is cleared at the first refusal.
type abilities struct {
	nowaitRead, nowaitWrite, dsync atomic.Bool
	canZero, canPunch, canAllocate atomic.Bool
}

// punch makes a range a hole, which does not move the end of the file.
func (a *abilities) punch(h *handle, off, n int64) error {
	if !a.canPunch.Load() {
		return blk.ErrNotSupported
	}
	err := fallocate(h.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, blk.ErrNotSupported) {
		a.canPunch.Store(false)
	}
	return err
}

// allocate reserves blocks for a range that reads as zeroes.
func (a *abilities) allocate(h *handle, off, n int64) error {
	err := fallocate(h.fd, 0, off, n)
	if errors.Is(err, blk.ErrNotSupported) {
		a.canAllocate.Store(false)
	}
	return err
}

// fallocate is fallocate(2); that the file system cannot do it is blk.ErrNotSupported.
func fallocate(fd int, mode uint32, off, n int64) error {
	return unsupported(again(func() error { return unix.Fallocate(fd, mode, off, n) }))
}

// blockIoctl is one of the ioctls that take a start and a length.
func blockIoctl(fd int, req uintptr, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	return unsupported(again(func() error { return ioctl(fd, req, unsafe.Pointer(&arg)) }))
}

// ioctl is ioctl(2) with a pointer.
func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

// unsupported turns the several ways to say "I do not have that call" into one.
func unsupported(err error) error {
	switch err {
	case unix.ENODEV, unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOTTY:
		return blk.ErrNotSupported
	}
	return err
}

// alignedBuf is a zeroed buffer whose address is a multiple of align, a power of two.
func alignedBuf(n, align int) []byte {
	if align <= 1 {
		return make([]byte, n)
	}
	b := make([]byte, n+align)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	return b[skip : skip+n : skip+n]
}
