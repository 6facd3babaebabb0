package file

import (
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/graph/blk"
)

// findFile finds a file by its name without opening it (O_PATH). The links of /proc that lead to
// what a process has open, or sees as its root, are not followed.
func findFile(name string) (int, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC
	fd, err := unix.Openat2(unix.AT_FDCWD, name, &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != unix.ENOSYS && err != unix.EPERM { // older kernels, and sandboxes that do not know it
		return fd, err
	}
	return findByText(name, flags)
}

// findByText is findFile for kernels that cannot do it: links are followed by what they say, which
// leads nowhere else than the words do.
func findByText(name string, flags int) (int, error) {
	path, err := filepath.EvalSymlinks(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return -1, blk.Errno(err)
	}
	fd, err := unix.Open(path, flags|unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, err
	}
	if real, err := os.Readlink(procFD(fd)); err != nil || real != path {
		_ = unix.Close(fd)
		return -1, unix.ELOOP // somebody changes the folders meanwhile
	}
	return fd, nil
}

// describe tells what the descriptor at names.
func describe(at int, name string) (*driver.FoundFile, error) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(at, &st); err != nil {
		return nil, blk.Errnof(err, "Could not stat '%s'", name)
	}
	if err := unix.Fstatfs(at, &fs); err != nil {
		return nil, blk.Errnof(err, "Could not stat the file system of '%s'", name)
	}
	kind := st.Mode & unix.S_IFMT
	path, _ := os.Readlink(procFD(at)) // "" says that it is not known
	return &driver.FoundFile{
		Name: name, Path: path,
		Regular: kind == unix.S_IFREG, Device: kind == unix.S_IFBLK,
		Kernel: slices.Contains(kernelFS, uint32(fs.Type)),
	}, nil
}

// kernelFS are file systems whose files the kernel makes up.
var kernelFS = []uint32{
	unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC,
	unix.SELINUX_MAGIC, unix.SMACK_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.BPF_FS_MAGIC,
	unix.DEVPTS_SUPER_MAGIC, unix.EFIVARFS_MAGIC, unix.PSTOREFS_MAGIC, unix.NSFS_MAGIC, unix.ANON_INODE_FS_MAGIC,
	unix.PIPEFS_MAGIC, unix.SOCKFS_MAGIC, unix.RDTGROUP_SUPER_MAGIC, unix.BINFMTFS_MAGIC,
	configFS, mqueueFS, fuseCtlFS,
}

// File systems that the kernel's headers for programs do not list.
const configFS, mqueueFS, fuseCtlFS = 0x62656570, 0x19800202, 0x65735543
