package file

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// directSafe is an alignment of memory, offset and length that every O_DIRECT file takes.
const directSafe = 4096

var fstatfs = unix.Fstatfs // but in tests

// storageOf tells whether the file's contents live in memory, so that calls on it never wait for a
// medium, and whether no server of a file system, in the network or in user space, has a part in
// what becomes of it. It asks that server.
func storageOf(fd int) (memory, local bool) {
	var st unix.Statfs_t
	if fstatfs(fd, &st) != nil {
		return false, false
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC, unix.HUGETLBFS_MAGIC:
		return true, true
	case unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC,
		unix.SMB_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.OCFS2_SUPER_MAGIC:
		return false, false
	}
	return false, true
}

// takesNoWait tells whether reads of the file can be asked not to wait.
func takesNoWait(fd int) bool {
	var b [1]byte
	_, err := xfer(unix.SYS_PREADV2, fd, blk.Buf(b[:]), 0, 0, unix.RWF_NOWAIT)
	return err == nil || err == unix.EAGAIN
}

// probeDirect finds what O_DIRECT on fd asks of offsets and of memory: the kernel's own
// word where it gives one, else by trying.
func probeDirect(fd int, block bool) (request int64, memory int, err error) {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.NFS_SUPER_MAGIC {
		return 1, 1, nil // the client sends whatever it is given
	}
	var sx unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &sx) == nil &&
		sx.Mask&unix.STATX_DIOALIGN != 0 && isAlignment(sx.Dio_offset_align) && isAlignment(sx.Dio_mem_align) {
		return int64(sx.Dio_offset_align), int(sx.Dio_mem_align), nil
	}
	if block {
		if n, e := unix.IoctlGetInt(fd, unix.BLKSSZGET); e == nil && n > 0 && n&(n-1) == 0 {
			request = int64(n)
		}
	}
	if request == 0 {
		request = tryAlignments(func(a int) bool { return readable(fd, alignedBuf(directSafe, directSafe)[:a]) })
	}
	buf := alignedBuf(2*directSafe, directSafe)
	m := tryAlignments(func(a int) bool { return readable(fd, buf[a:a+directSafe]) })
	if request == 0 || m == 0 {
		return 0, 0, blk.WithHint(errors.New("Could not find working O_DIRECT alignment"), "Try cache.direct=off")
	}
	return request, int(m), nil
}

func isAlignment(n uint32) bool { return n > 0 && n <= 1<<20 && n&(n-1) == 0 }

// tryAlignments is the first alignment that ok accepts, 0 if none. That 1 works says that
// the probe hit a hole or the end of the file, where nothing is checked: then the safe value.
func tryAlignments(ok func(a int) bool) int64 {
	for _, a := range []int{1, 512, 1024, 2048, 4096} {
		if ok(a) {
			if a == 1 {
				return directSafe
			}
			return int64(a)
		}
	}
	return 0
}

// readable tells whether the kernel takes that length and address; other errors than
// EINVAL are the medium's and say nothing against the alignment.
func readable(fd int, b []byte) bool {
	return again(func() error { _, err := unix.Pread(fd, b, 0); return err }) != unix.EINVAL
}

// notWritable is EACCES for a block device that is set read-only: opening it for writing
// works, writing does not.
func notWritable(fd int, block bool) error {
	if !block {
		return nil
	}
	var ro int32
	err := ioctl(fd, unix.BLKROGET, unsafe.Pointer(&ro))
	if err == nil && ro != 0 {
		err = unix.EACCES
	}
	return err
}
