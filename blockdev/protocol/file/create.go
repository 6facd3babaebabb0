package file

import (
	"context"
	"log/slog"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Create makes a regular file of the given size, or empties and resizes an existing one that nobody
// uses. It blocks as long as the storage does, but no longer than ctx. begin, if not nil, is called
// once the file is there, and nobody else can use it, and before its content is touched; also after
// Create has returned because ctx has ended. With an error of it nothing is touched, and nothing
// new stays. What is there when Create fails later stays there; see driver.Made.
func Create(ctx context.Context, o *types.BlockdevCreateOptionsFile, begin func(driver.Made) error) error {
	hint := types.Or(o.ExtentSizeHint, 1<<20)
	if hint > math.MaxUint32 {
		return blk.Text("Extent size hint is too large", unix.EINVAL)
	}
	_, err := await(ctx, o.Filename, func() error { return create(ctx, o, uint32(hint), begin) }, func(error) {})
	return err
}

// create does the work of Create.
func create(
	ctx context.Context, o *types.BlockdevCreateOptionsFile, hint uint32, begin func(driver.Made) error,
) (err error) {
	var m driver.Made
	fd, err := openFile(o.Filename, o.Filename, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o644)
	isNew := err == nil
	if blk.Errno(err) == unix.EEXIST {
		fd, err = openFile(o.Filename, o.Filename, unix.O_RDWR|unix.O_CREAT, 0o644)
	}
	if err != nil {
		return err
	}
	defer func() {
		// Closing also gives the locks back.
		if cerr := unix.Close(fd); cerr != nil && err == nil {
			err = blk.Errnof(cerr, "Could not close the new file")
		}
	}()

	// All is thrown away and nobody may move the end, which is promised to be where we put it.
	claim := perm.Claim{Need: perm.Write | perm.Resize, Share: perm.All &^ perm.Resize}
	if err := takeLocks(fd, lockSet{}, locksFor(claim), o.Filename); err != nil {
		return err
	}
	if begin != nil {
		if m.ID, err = fileID(fd); err == nil {
			if isNew {
				m.Remove = func() { remove(o.Filename, m.ID) }
			}
			err = begin(m)
		}
		if err != nil {
			if isNew {
				unlinkSame(o.Filename, m.ID)
			}
			return err
		}
	}
	if err := truncate(ctx, fd, 0, blk.PreallocOff); err != nil {
		return err
	}
	if types.Or(o.Nocow, false) {
		setNoCOW(fd)
	}
	if err := setExtentHint(fd, hint); err != nil && o.ExtentSizeHint != nil && hint != 0 {
		slog.WarnContext(ctx, "Failed to set extent size hint: "+blk.ErrnoText(err), "file", o.Filename)
	}
	return truncate(ctx, fd, int64(o.Size), blk.Prealloc(types.Or(o.Preallocation, types.PreallocModeOff)))
}

// remove removes a file from path, unless path leads to another one by now or somebody has begun to
// use it.
func remove(path string, file graph.FileID) {
	fd, err := openFile(path, path, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(fd) }()
	if id, err := fileID(fd); err != nil || id != file {
		return
	}
	if takeLocks(fd, lockSet{}, locksFor(perm.Claim{Need: perm.Write | perm.Resize}), path) == nil {
		unlinkSame(path, file)
	}
}

// unlinkSame removes a file that the caller holds locked.
func unlinkSame(path string, id graph.FileID) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) == nil && id == (graph.FileID{Dev: uint64(st.Dev), Ino: st.Ino}) {
		_ = unix.Unlink(path)
	}
}

// fileID is the identity of an open regular file.
func fileID(fd int) (graph.FileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return graph.FileID{}, blk.Errnof(err, "Could not stat file")
	}
	return graph.FileID{Dev: uint64(st.Dev), Ino: st.Ino}, nil
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
	if err := ioctl(fd, fsIocFSGetXattr, unsafe.Pointer(&a)); err != nil {
		return err
	}
	a.xflags |= fsXflagExtSize
	a.extsize = size
	return ioctl(fd, fsIocFSSetXattr, unsafe.Pointer(&a))
}

// extentHint is the size of extents that the file system is to aim at, 0 if none is set.
func extentHint(fd int) uint32 {
	var a fsxattr
	if ioctl(fd, fsIocFSGetXattr, unsafe.Pointer(&a)) != nil {
		return 0
	}
	return a.extsize
}
