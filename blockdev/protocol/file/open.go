package file

import (
	"context"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// settings are what opening depends on.
type settings struct {
	name   string
	driver string // for messages
	device bool   // host_device: a block or character device; else a regular file
	ro     bool
	auto   bool // auto-read-only
	direct bool // cache.direct
	// noFlush: cache.no-flush; what is written need never reach the medium.
	noFlush bool
	locks   bool
	// drive: host_cdrom, which can be opened without a disk.
	drive bool
	drop  bool                            // forget cached pages when opening
	check bool                            // look whether that worked
	admit func(f *driver.FoundFile) error // asked before the file is opened; nil: it may be
}

// openDisk opens and probes a file. It blocks as long as the storage does, but no longer
// than ctx; an open that is stuck by then is closed when the kernel lets go of it.
func openDisk(ctx context.Context, s settings) (*disk, error) {
	if strings.HasPrefix(s.name, "/dev/fdset/") {
		return nil, blk.Errnof(unix.ENOSYS, "Could not dup FD for %s flags %x", s.name, s.flags(s.startWritable()))
	}
	var d *disk
	late, err := await(ctx, s.name, func() (err error) {
		d, err = openNow(s)
		return err
	}, func(err error) {
		if err == nil {
			_ = d.Close()
		}
	})
	if late {
		return nil, err
	}
	return d, err
}

// startWritable: under auto-read-only a file is opened for writing when the first writer comes.
func (s *settings) startWritable() bool { return !s.ro && !s.auto }

func (s *settings) flags(writable bool) int {
	f := unix.O_RDONLY
	if writable {
		f = unix.O_RDWR
	}
	if s.direct {
		f |= unix.O_DIRECT
	}
	if s.drive {
		f |= unix.O_NONBLOCK
	}
	return f
}

// openNow opens, checks the kind of file and probes what it can do.
func openNow(s settings) (*disk, error) {
	writable := s.startWritable()
	fd, err := s.open(s.flags(writable))
	if err != nil {
		return nil, err
	}
	h := newHandle(fd, writable)
	d := &disk{
		settings:  s,
		opened:    opened{busy: make(chan struct{}, maxBusy)},
		permSlot:  make(chan struct{}, 1),
		fdatasync: unix.Fdatasync,
		writeBack: startWriteBack,
	}
	if err := d.setup(h); err != nil {
		h.drop()
		return nil, err
	}
	d.cur.Store(h)
	return d, nil
}

// open opens the file. One that has to be admitted is found first, without being opened: a FIFO
// would wait for its other end, and some devices act when they are opened. Then that file is
// opened, whatever its name leads to by then.
func (s *settings) open(flags int) (int, error) {
	if s.admit == nil {
		return openFile(s.name, s.name, flags, 0)
	}
	at, err := findFile(s.name)
	if err != nil {
		return -1, blk.Errnof(err, "Could not open '%s'", s.name)
	}
	defer func() { _ = unix.Close(at) }()
	f, err := describe(at, s.name)
	if err == nil {
		err = s.admit(f)
	}
	if err != nil {
		return -1, err
	}
	return openSame(at, s.name, flags)
}

// procFD is the name under which the kernel shows a descriptor of this process.
func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// setup looks at the open file and fills in what does not change any more.
func (d *disk) setup(h *handle) error {
	var st unix.Stat_t
	if err := unix.Fstat(h.fd, &st); err != nil {
		return blk.Errnof(err, "Could not stat file")
	}
	d.id = graph.FileID{Dev: uint64(st.Dev), Ino: st.Ino}
	if d.device {
		d.id = graph.FileID{Dev: uint64(st.Rdev)}
	}
	kind := st.Mode & unix.S_IFMT
	d.block = kind == unix.S_IFBLK
	if h.writable {
		if err := notWritable(h.fd, d.block); err != nil {
			return blk.Errnof(err, "The device is not writable")
		}
	}
	wrong := ""
	switch {
	case !d.device && kind != unix.S_IFREG:
		wrong = "a regular file"
	case d.device && kind != unix.S_IFBLK && kind != unix.S_IFCHR:
		wrong = "either a character or block device"
	}
	if wrong != "" {
		return blk.Text("'"+d.driver+"' driver requires '"+d.name+"' to be "+wrong, unix.EINVAL)
	}

	d.memory, d.local = storageOf(h.fd)
	d.memory = d.memory && !d.device
	if kind == unix.S_IFREG {
		d.hint = extentHint(h.fd)
	}
	var err error
	if d.direct, err = d.alignments(h.fd, d.settings.direct, &d.limits); err != nil {
		return err
	}
	if d.block {
		if n, err := unix.IoctlGetInt(h.fd, unix.BLKSSZGET); err == nil && n > 0 {
			d.limits.ZeroAlign, d.limits.DiscardAlign = int64(n), int64(n)
		}
	}

	end, err := seekEnd(h.fd) // which memory of a process, called a regular file by the kernel, has not
	if err != nil {
		return blk.Errnof(err, "Could not refresh total sector count")
	}
	d.fixed = d.device
	d.setEnd(end)
	d.setNoWait(h.fd, d.direct)
	for _, a := range []*atomic.Bool{&d.dsync, &d.canZero, &d.canPunch, &d.canAllocate} {
		a.Store(true)
	}
	if kind == unix.S_IFCHR {
		return nil
	}
	return d.takeOver(h.fd) // last: what came before may have read
}

// alignments fills in what an open file asks of requests, and tells whether it has the restrictions
// of O_DIRECT when it was opened so.
func (d *disk) alignments(fd int, direct bool, l *blk.Limits) (bool, error) {
	l.RequestAlign, l.MemAlign = 1, 1
	if !direct || d.memory {
		return false, nil
	}
	a, m, err := probeDirect(fd, d.block)
	if err != nil {
		return false, err
	}
	l.RequestAlign, l.MemAlign = a, m
	return true, nil
}

// setNoWait notes what may be asked not to wait, of a file that is open with O_DIRECT or not.
func (a *abilities) setNoWait(fd int, direct bool) {
	a.nowaitRead.Store(!direct && takesNoWait(fd))
	a.nowaitWrite.Store(!direct)
}

// openAgain opens the file behind cur with another access mode: that file, wherever it was
// moved since.
func (d *disk) openAgain(cur *handle, flags int) (*handle, error) {
	writable := flags&unix.O_ACCMODE == unix.O_RDWR
	fd, err := openSame(cur.fd, d.name, flags)
	if err != nil {
		return nil, err
	}
	if writable {
		if err := notWritable(fd, d.block); err != nil {
			_ = unix.Close(fd)
			return nil, blk.Errnof(err, "The device is not writable")
		}
	}
	return newHandle(fd, writable), nil
}

// openSame opens the file behind the descriptor at, which has or had that name.
func openSame(at int, name string, flags int) (int, error) {
	fd, err := openFile(procFD(at), name, flags, 0)
	if err != nil && blk.Errno(err) == unix.ENOENT { // no /proc
		fd, err = openFile(name, name, flags, 0)
		if err == nil && !sameFile(fd, at) {
			_ = unix.Close(fd)
			fd, err = -1, blk.Errnof(unix.ESTALE, "Could not open '%s'", name)
		}
	}
	return fd, err
}

// openFile is open(2) of path with errors in QEMU's words, which speak of name.
func openFile(path, name string, flags int, mode uint32) (int, error) {
	fd := -1
	err := again(func() (err error) {
		fd, err = unix.Open(path, flags|unix.O_CLOEXEC, mode)
		return err
	})
	if err == nil {
		return fd, nil
	}
	verb := "open"
	if flags&unix.O_CREAT != 0 {
		verb = "create"
	}
	if err == unix.EINVAL && flags&unix.O_DIRECT != 0 {
		if fd, e := unix.Open(path, flags&^unix.O_DIRECT|unix.O_CLOEXEC, mode); e == nil {
			_ = unix.Close(fd)
			return -1, blk.Text("Could not "+verb+" '"+name+"': filesystem does not support O_DIRECT", err)
		}
	}
	return -1, blk.Errnof(err, "Could not %s '%s'", verb, name)
}

// sameFile tells whether two descriptors are of one file.
func sameFile(a, b int) bool {
	var x, y unix.Stat_t
	return unix.Fstat(a, &x) == nil && unix.Fstat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

// wakeFIFO ends opens of a FIFO that wait for its other end.
func wakeFIFO(name string) {
	var st unix.Stat_t
	if unix.Stat(name, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return
	}
	if fd, err := unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		_ = unix.Close(fd)
	}
}

// await runs work and returns its error. If ctx ends first it returns ctx's error and true;
// work goes on, and cleanup is called with its result. If work opens fifo, "" for none, and that is
// one, it is woken then.
func await(ctx context.Context, fifo string, work func() error, cleanup func(error)) (late bool, err error) {
	const running, finished, abandoned = 0, 1, 2
	var state atomic.Int32
	done := make(chan error, 1)
	panics.Go("opening a file", func() {
		err := work()
		if state.CompareAndSwap(running, finished) {
			done <- err
			return
		}
		cleanup(err)
	}, func(err error) {
		if state.CompareAndSwap(running, finished) {
			done <- err
		}
	})
	select {
	case err := <-done:
		return false, err
	case <-ctx.Done():
		if state.CompareAndSwap(running, abandoned) {
			if fifo != "" {
				panics.Go("waking a FIFO", func() { wakeFIFO(fifo) }, nil) // looking at it may hang as well
			}
			return true, ctx.Err()
		}
		return false, <-done
	}
}
