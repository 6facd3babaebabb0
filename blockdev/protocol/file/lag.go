package file

import (
	"bufio"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Lag implements graph.Lagging: what of the file the kernel has not written yet (before Linux 6.5
// that of all files), and whether a call on a local file system is under way: it cannot be
// interrupted, and a device that empties its cache shows nothing for seconds. It asks the kernel
// about pages only: whatever asks the file system would wait for the very server that does not
// answer.
func (d *disk) Lag() (bytes int64, bound bool) {
	h := d.hold()
	if h == nil {
		return 0, false
	}
	defer h.Release()
	if !h.writable || d.memory {
		return 0, false
	}
	bound = d.local && h.refs.Load() > 2 // references besides the driver's and this one
	var s unix.Cachestat_t
	if unix.Cachestat(uint(h.fd), &unix.CachestatRange{}, &s, 0) != nil {
		return unwritten(), bound
	}
	return int64(s.Dirty+s.Writeback) * int64(os.Getpagesize()), bound
}

// unwritten is what of all files the kernel has not written yet, in bytes (proc(5), /proc/meminfo);
// 0 where that cannot be found out.
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
