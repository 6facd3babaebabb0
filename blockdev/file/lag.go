package file

import (
	"bufio"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Lag implements graph.Lagging: what of the file the kernel has not written yet (before Linux 6.5 that of all files), and whether a call on a local
// file system is under way: it cannot be interrupted, and a device that empties its cache shows nothing for seconds.
func (d *disk) Lag() (bytes int64, bound bool) {
	h := d.hold()
	if h == nil {
		return 0, false
	}
	defer h.Release()
	if !h.writable || d.memory {
		return 0, false
	}
	bound = h.refs.Load() > 2 && onLocalStorage(h.fd) // references besides the driver's and this one
	var s unix.Cachestat_t
	if unix.Cachestat(uint(h.fd), &unix.CachestatRange{}, &s, 0) != nil {
		return unwritten(), bound
	}
	return int64(s.Dirty+s.Writeback) * int64(os.Getpagesize()), bound
}

// onLocalStorage tells whether no server of a file system, in the network or in user space, has a part in what becomes of the file.
func onLocalStorage(fd int) bool {
	var st unix.Statfs_t
	if unix.Fstatfs(fd, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.SMB_SUPER_MAGIC,
		unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC, unix.V9FS_MAGIC, unix.OCFS2_SUPER_MAGIC:
		return false
	}
	return true
}

// unwritten is what of all files the kernel has not written yet, in bytes (proc(5), /proc/meminfo); 0 where that cannot be found out.
func unwritten() (n int64) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, _ := strings.Cut(s.Text(), ":")
		if k == "Dirty" || k == "Writeback" {
			kib, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			n += kib << 10
		}
	}
	return n
}
