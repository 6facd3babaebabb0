package file

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The io_uring interface, from linux/io_uring.h.
const (
	uringOffSQEs       = 0x10000000
	uringSingleMmap    = 1 << 0
	uringRegEventfd    = 4
	uringOpReadv       = 1
	uringOpWritev      = 2
	uringOpFsync       = 3
	uringFsyncDatasync = 1
)

type uringOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32 // for completions: flags is overflow, dropped is cqes
	_                                                   uint64
}

type uringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wqFD uint32
	_                                                      [3]uint32
	sq, cq                                                 uringOffsets
}

type uringSQE struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off           uint64
	addr          uint64
	n             uint32
	rwFlags       uint32
	user          uint64
	_             [3]uint64
}

type uringCQE struct {
	user  uint64
	res   int32
	flags uint32
}

// uring is a queue over io_uring.
type uring struct {
	fd         int
	ring, sqes []byte // mapped

	sqTail *uint32 // written by push alone
	sqMask uint32
	array  []uint32
	sqe    []uringSQE

	cqHead *uint32 // written by reap alone
	cqTail *uint32 // written by the kernel
	cqMask uint32
	cqe    []uringCQE
}

func newUring(efd int) (queue, error) {
	var p uringParams
	fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, engineDepth, uintptr(unsafe.Pointer(&p)), 0)
	if e != 0 {
		return nil, e
	}
	unix.CloseOnExec(int(fd))
	u := &uring{fd: int(fd)}
	if err := u.mmap(&p); err != nil {
		u.close()
		return nil, err
	}
	arg := int32(efd)
	_, _, e = unix.Syscall6(unix.SYS_IO_URING_REGISTER, fd, uringRegEventfd, uintptr(unsafe.Pointer(&arg)), 1, 0, 0)
	if e != 0 {
		u.close()
		return nil, e
	}
	return u, nil
}

// mmap maps the rings and finds their parts.
func (u *uring) mmap(p *uringParams) (err error) {
	if p.features&uringSingleMmap == 0 { // before Linux 5.4
		return unix.ENOSYS
	}
	n := max(p.sq.array+4*p.sqEntries, p.cq.dropped+uint32(unsafe.Sizeof(uringCQE{}))*p.cqEntries)
	const prot, how = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if u.ring, err = unix.Mmap(u.fd, 0, int(n), prot, how); err != nil {
		return err
	}
	n = p.sqEntries * uint32(unsafe.Sizeof(uringSQE{}))
	if u.sqes, err = unix.Mmap(u.fd, uringOffSQEs, int(n), prot, how); err != nil {
		return err
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&u.ring[off])) }
	u.sqTail, u.sqMask = at(p.sq.tail), *at(p.sq.mask)
	u.array = unsafe.Slice(at(p.sq.array), p.sqEntries)
	u.sqe = unsafe.Slice((*uringSQE)(unsafe.Pointer(&u.sqes[0])), p.sqEntries)
	u.cqHead, u.cqTail, u.cqMask = at(p.cq.head), at(p.cq.tail), *at(p.cq.mask)
	u.cqe = unsafe.Slice((*uringCQE)(unsafe.Pointer(&u.ring[p.cq.dropped])), p.cqEntries)
	return nil
}

// push implements queue. The ring has an entry for each slot, so there is always room.
func (u *uring) push(s *slot) {
	tail := atomic.LoadUint32(u.sqTail)
	i := tail & u.sqMask
	e := &u.sqe[i]
	*e = uringSQE{fd: int32(s.fd), off: uint64(s.off), user: uint64(s.id)}
	switch s.op {
	case opSync:
		e.opcode, e.off, e.rwFlags = uringOpFsync, 0, uringFsyncDatasync
	case opRead:
		e.opcode = uringOpReadv
	case opWrite:
		e.opcode = uringOpWritev
	}
	if s.op != opSync {
		e.addr, e.n, e.rwFlags = uint64(uintptr(unsafe.Pointer(&s.iov[0]))), uint32(s.n), s.flags
	}
	u.array[i] = i
	atomic.StoreUint32(u.sqTail, tail+1)
}

// submit implements queue.
func (u *uring) submit(n int, _ func(uint32, int64)) int {
	for {
		k, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(u.fd), uintptr(n), 0, 0, 0, 0)
		switch e {
		case 0:
			return int(k)
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.EBUSY, unix.ENOMEM:
			return 0
		}
		panic("file: io_uring_enter: " + e.Error())
	}
}

// reap implements queue.
func (u *uring) reap(complete func(uint32, int64)) {
	head := atomic.LoadUint32(u.cqHead)
	for tail := atomic.LoadUint32(u.cqTail); head != tail; tail = atomic.LoadUint32(u.cqTail) {
		c := u.cqe[head&u.cqMask]
		head++
		atomic.StoreUint32(u.cqHead, head)
		complete(uint32(c.user), int64(c.res))
	}
}

func (u *uring) syncs() bool { return true }

func (u *uring) close() {
	if u.sqes != nil {
		_ = unix.Munmap(u.sqes)
	}
	if u.ring != nil {
		_ = unix.Munmap(u.ring)
	}
	_ = unix.Close(u.fd)
}
