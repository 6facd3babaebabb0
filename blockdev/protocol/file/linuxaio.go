package file

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The Linux AIO interface, from linux/aio_abi.h.
const (
	aioPreadv    = 7
	aioPwritev   = 8
	aioFlagResFD = 1
)

type aioCB struct {
	data     uint64
	_        uint32 // key: the kernel's
	rwFlags  uint32
	opcode   uint16
	_        int16 // priority
	fd       uint32
	buf      uint64
	n        uint64
	off      int64
	_        uint64
	flags    uint32
	resultFD uint32
}

type aioEvent struct {
	data, obj uint64
	res, res2 int64
}

// linuxAIO is a queue over the io_submit family.
type linuxAIO struct {
	ctx  uintptr
	efd  int
	cbs  [engineDepth]aioCB    // by slot
	ring [engineDepth]*aioCB   // pushed ones, at index modulo its length
	tail uint32                // next place to push to
	head uint32                // next to submit; submit's own
	evs  [engineDepth]aioEvent // reap's own
}

func newLinuxAIO(efd int) (queue, error) {
	a := &linuxAIO{efd: efd}
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, engineDepth, uintptr(unsafe.Pointer(&a.ctx)), 0); e != 0 {
		return nil, e
	}
	return a, nil
}

// push implements queue.
func (a *linuxAIO) push(s *slot) {
	op := uint16(aioPreadv)
	if s.op == opWrite {
		op = aioPwritev
	}
	cb := &a.cbs[s.id]
	*cb = aioCB{
		data: uint64(s.id), opcode: op, rwFlags: s.flags, fd: uint32(s.fd),
		buf: uint64(uintptr(unsafe.Pointer(&s.iov[0]))), n: uint64(s.n), off: s.off,
		flags: aioFlagResFD, resultFD: uint32(a.efd),
	}
	a.ring[a.tail%engineDepth] = cb
	a.tail++
}

// submit implements queue.
func (a *linuxAIO) submit(n int, complete func(uint32, int64)) int {
	i := a.head % engineDepth
	n = min(n, int(engineDepth-i)) // up to the end of the ring
	for {
		k, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, a.ctx, uintptr(n), uintptr(unsafe.Pointer(&a.ring[i])))
		switch e {
		case 0:
			a.head += uint32(k)
			return int(k)
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return 0
		}
		// The first one is refused, for example for its alignment.
		a.head++
		complete(uint32(a.ring[i].data), -int64(e))
		return 1
	}
}

// reap implements queue.
func (a *linuxAIO) reap(complete func(uint32, int64)) {
	for {
		var now unix.Timespec
		k, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.ctx, 0, engineDepth,
			uintptr(unsafe.Pointer(&a.evs[0])), uintptr(unsafe.Pointer(&now)), 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			panic("file: io_getevents: " + e.Error())
		}
		for i := range a.evs[:k] {
			complete(uint32(a.evs[i].data), a.evs[i].res)
		}
		if k < engineDepth {
			return
		}
	}
}

func (a *linuxAIO) syncs() bool { return false }

func (a *linuxAIO) close() {
	_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, a.ctx, 0, 0)
}
