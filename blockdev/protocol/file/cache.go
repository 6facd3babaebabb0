package file

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// checkWindow is how much of a file is mapped at once to look for cached pages, in bytes.
const checkWindow = 128 << 20

var errCached = errors.New("page cache still in use!")

// setCache takes drop-cache and x-check-cache-dropped over. To check means to drop, unless that is
// switched off.
func (s *settings) setCache(o *types.BlockdevOptionsFile) {
	s.check = types.Or(o.XCheckCacheDropped, false)
	s.drop = types.Or(o.DropCache, s.check)
}

// takeOver makes sure that what is read is not what this host remembers from a time when another
// host had the file: the kernel forgets cached pages, if drop-cache says so. It blocks until all
// that is dirty is written.
func (s *settings) takeOver(fd int) error {
	if !s.drop || s.direct {
		return nil
	}
	// Dirty pages would stay.
	if err := unix.Fdatasync(fd); err != nil {
		return blk.Errnof(err, "flush failed")
	}
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return blk.Errnof(err, "fadvise failed")
	}
	if !s.check {
		return nil
	}
	return checkDropped(fd)
}

// checkDropped fails if pages of fd are in the cache.
func checkDropped(fd int) error {
	size, err := unix.Seek(fd, 0, unix.SEEK_END)
	if err != nil {
		return blk.Errnof(err, "failed to get the size")
	}
	page := int64(unix.Getpagesize())
	in := make([]byte, checkWindow/page)
	for off := int64(0); off < size; off += checkWindow {
		n := min(size-off, checkWindow)
		m, err := unix.Mmap(fd, off, int(n), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return blk.Errnof(err, "failed to map the file")
		}
		_, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(m))), uintptr(n),
			uintptr(unsafe.Pointer(unsafe.SliceData(in))))
		_ = unix.Munmap(m)
		if e != 0 {
			return blk.Errnof(e, "failed to look at the page cache")
		}
		for _, p := range in[:(n+page-1)/page] {
			if p&1 != 0 {
				return errCached
			}
		}
	}
	return nil
}
