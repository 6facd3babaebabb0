package file

import (
	"context"
	"errors"
	"log/slog"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// Resize implements graph.Resizer. A regular file gets exactly that size; a device must be at least
// as long and stays as it is, but if others have changed its length, that is noticed. The file
// keeps its length when it fails.
func (d *disk) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	defer h.drop()
	if !d.device {
		defer d.extent.Store(nil)
		if err := truncate(ctx, h.fd, size, m); err != nil {
			return err
		}
		d.setEnd(size)
		return nil
	}
	if m != blk.PreallocOff && m != "" {
		return blk.Text("Preallocation mode '"+string(m)+"' unsupported for this non-regular file", blk.ErrNotSupported)
	}
	now, err := seekEnd(h.fd)
	switch {
	case err != nil:
		return blk.Errnof(err, "Could not get the length of the device")
	case size > now:
		return blk.Text("Cannot grow device files", unix.EINVAL)
	}
	if d.eof.Load() != now {
		d.extent.Store(nil)
		d.setEnd(now)
	}
	return nil
}

// truncate makes a regular file exactly size bytes long and prepares what is new as the
// preallocation mode says. On failure the old length is restored.
func truncate(ctx context.Context, fd int, size int64, m blk.Prealloc) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return blk.Errnof(err, "Could not stat file")
	}
	old := st.Size
	if old > size && m != blk.PreallocOff && m != "" {
		return blk.Text("Cannot use preallocation for shrinking files", blk.ErrNotSupported)
	}
	var err error
	switch m {
	case blk.PreallocOff, "":
		if err := ftruncate(fd, size); err != nil {
			return blk.Errnof(err, "Could not resize file")
		}
		if old == 0 && size > 0 {
			allocateFirst(fd, size)
		}
		return nil
	case blk.PreallocFalloc:
		err = preallocate(ctx, fd, old, size)
	case blk.PreallocFull:
		err = writeOut(ctx, fd, old, size)
	default:
		return blk.Text("Unsupported preallocation mode: "+string(m), blk.ErrNotSupported)
	}
	if err != nil {
		if rerr := ftruncate(fd, old); rerr != nil {
			slog.Error("Failed to restore old file length", "error", blk.ErrnoText(rerr))
		}
	}
	return err
}

// preallocate reserves blocks for [old, size); on file systems that cannot, it writes to
// each block.
func preallocate(ctx context.Context, fd int, old, size int64) error {
	if size == old {
		return nil
	}
	err := fallocate(fd, 0, old, size-old)
	if errors.Is(err, blk.ErrNotSupported) {
		err = touchBlocks(ctx, fd, old, size)
	}
	if err != nil {
		return blk.Errnof(err, "Could not preallocate new data")
	}
	if old == 0 {
		allocateFirst(fd, size)
	}
	return nil
}

// touchBlocks grows a file by writing one zero byte to each of its new blocks.
func touchBlocks(ctx context.Context, fd int, old, size int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	step := max(st.Blksize, blk.SectorSize)
	for off := old; off < size; off += step {
		if err := ctx.Err(); err != nil {
			return unix.ECANCELED
		}
		if err := pwriteFull(fd, blk.Buf(make([]byte, 1)), min(off+step, size)-1); err != nil {
			return err
		}
	}
	return nil
}

// writeOut fills [old, size) with written zeroes.
func writeOut(ctx context.Context, fd int, old, size int64) error {
	// Knowing the end beforehand lets the file system allocate in fewer pieces.
	if err := ftruncate(fd, size); err != nil {
		return blk.Errnof(err, "Could not resize file")
	}
	const chunk = 64 << 10
	buf := alignedBuf(chunk, directSafe)
	for off := old; off < size; off += chunk {
		err := ctx.Err()
		if err != nil {
			err = unix.ECANCELED
		} else {
			err = pwriteFull(fd, blk.Buf(buf[:min(chunk, size-off)]), off)
		}
		if err != nil {
			return blk.Errnof(err, "Could not write zeros for preallocation")
		}
	}
	if err := unix.Fsync(fd); err != nil {
		return blk.Errnof(err, "Could not flush file to disk")
	}
	return nil
}

// allocateFirst writes the first block of a file that was empty. Direct reads of an
// unallocated block succeed with any alignment, so who probes the alignment of this file
// later needs a real one. Failure costs only that.
func allocateFirst(fd int, size int64) {
	n := int64(directSafe)
	if size < n {
		n = blk.SectorSize
	}
	_ = pwriteFull(fd, blk.Buf(alignedBuf(int(n), directSafe)), 0)
}

func ftruncate(fd int, size int64) error {
	return again(func() error { return unix.Ftruncate(fd, size) })
}

// again makes a system call until no signal interrupts it.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
