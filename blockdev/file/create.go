package file

import (
	"context"
	"log/slog"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Create makes a regular file of the given size, or empties and resizes an existing one
// that nobody uses. It blocks as long as the storage does, but no longer than ctx. What is
// there when it fails half-way stays there. started, if not nil, is called once the file is there and before its
// content is touched.
func Create(ctx context.Context, o *types.BlockdevCreateOptionsFile, started func()) error {
	hint := uint64(1 << 20)
	if o.ExtentSizeHint != nil {
		hint = *o.ExtentSizeHint
	}
	if hint > math.MaxUint32 {
		return &textError{"Extent size hint is too large", unix.EINVAL}
	}
	late, err := await(ctx, func() error { return create(ctx, o, uint32(hint), started) }, func(error) {})
	if late {
		go wakeFIFO(o.Filename)
	}
	return err
}

// create does the work of Create.
func create(ctx context.Context, o *types.BlockdevCreateOptionsFile, hint uint32, started func()) (err error) {
	fd, err := openFile(o.Filename, o.Filename, unix.O_RDWR|unix.O_CREAT, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		// Closing also gives the locks back.
		if cerr := unix.Close(fd); cerr != nil && err == nil {
			err = errnoError(cerr, "Could not close the new file")
		}
	}()

	// All is thrown away and nobody may move the end, which is promised to be where we put it.
	claim := perm.Claim{Need: perm.Write | perm.Resize, Share: perm.All &^ perm.Resize}
	if err := takeLocks(fd, lockSet{}, locksFor(claim), o.Filename); err != nil {
		return err
	}
	if started != nil {
		started()
	}
	if err := truncate(ctx, fd, 0, blk.PreallocOff); err != nil {
		return err
	}
	if o.Nocow != nil && *o.Nocow {
		setNoCOW(fd)
	}
	if err := setExtentHint(fd, hint); err != nil && o.ExtentSizeHint != nil && hint != 0 {
		slog.WarnContext(ctx, "Failed to set extent size hint: "+blk.ErrnoText(err), "file", o.Filename)
	}
	m := blk.PreallocOff
	if o.Preallocation != nil {
		m = blk.Prealloc(*o.Preallocation)
	}
	return truncate(ctx, fd, int64(o.Size), m)
}

// fsNoCOW is FS_NOCOW_FL of linux/fs.h.
const fsNoCOW = 0x00800000

// setNoCOW asks the file system to overwrite in place; one that knows no other way refuses,
// which is as good.
func setNoCOW(fd int) {
	attr, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err == nil {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, attr|fsNoCOW)
	}
}

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

const (
	fsIocFSGetXattr = 0x801c581f
	fsIocFSSetXattr = 0x401c5820
	fsXflagExtSize  = 0x00000800
)

// setExtentHint sets the size of extents that the file system should aim at.
func setExtentHint(fd int, size uint32) error {
	var a fsxattr
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFSGetXattr, uintptr(unsafe.Pointer(&a))); e != 0 {
		return e
	}
	a.xflags |= fsXflagExtSize
	a.extsize = size
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFSSetXattr, uintptr(unsafe.Pointer(&a))); e != 0 {
		return e
	}
	return nil
}
