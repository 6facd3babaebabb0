package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// pidFile is a locked file with the process id; it exists while the daemon is up.
type pidFile struct {
	f    *os.File
	path string // absolute: the daemon changes its directory
}

// writePidFile creates and locks path. A file left by a dead process is taken over; a live one
// holds its lock.
func writePidFile(path string) (*pidFile, error) {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("cannot create PID file: "+format, args...)
	}
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|unix.O_NONBLOCK, 0o600) // a FIFO would wait for its other end
		if err != nil {
			return nil, fail("Could not create '%s': %s", path, blk.ErrnoText(err))
		}
		lock := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
			f.Close()
			return nil, fail("Cannot lock pid file: %s", blk.ErrnoText(err))
		}
		// Another process may have removed the file between open and lock.
		mine, err1 := f.Stat()
		there, err2 := os.Stat(path)
		if err1 != nil || err2 != nil || !os.SameFile(mine, there) {
			f.Close()
			continue
		}
		if err := f.Truncate(0); err != nil { // a device stays
			f.Close()
			return nil, fail("Failed to truncate pid file: %s", blk.ErrnoText(err))
		}
		abs, err := filepath.Abs(path)
		if err != nil {
			abs = path
		}
		p := &pidFile{f: f, path: abs}
		if _, err := fmt.Fprintf(f, "%d\n", os.Getpid()); err != nil {
			p.remove()
			return nil, fail("Failed to write pid file: %s", blk.ErrnoText(err))
		}
		return p, nil
	}
}

// remove deletes the file and gives up the lock.
func (p *pidFile) remove() {
	if p != nil {
		// What somebody else has put there stays.
		mine, err1 := p.f.Stat()
		there, err2 := os.Lstat(p.path)
		if err1 == nil && err2 == nil && os.SameFile(mine, there) {
			_ = os.Remove(p.path)
		}
		p.f.Close()
	}
}
