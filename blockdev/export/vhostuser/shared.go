package vhostuser

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
)

// mapShared maps size bytes of fd from off on, which need not be a multiple of pages; mapped is all
// that is to be unmapped.
func mapShared(fd int, off, size uint64) (b, mapped []byte, err error) {
	const page, most = 4096, 1 << 40
	if size == 0 || size > most || off > most {
		return nil, nil, errors.New("shared memory is empty, or too large")
	}
	skip := off % page
	mapped, err = unix.Mmap(fd, int64(off-skip), int(size+skip), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	return mapped[skip:], mapped, nil
}

// inflightArea is shared memory that says which requests are under way; it outlives the daemon.
type inflightArea struct {
	bytes     []byte // mapped
	area      []byte // of bytes
	queueSize int
	queues    int
}

// set maps the area that a front end gives back.
func (a *inflightArea) set(fd int, i vhostwire.Inflight) error {
	b, mapped, err := mapShared(fd, i.Offset, i.Size)
	if err != nil {
		return err
	}
	a.close()
	*a = inflightArea{mapped, b, int(i.QueueSize), int(i.Queues)}
	return nil
}

// of is the part for a queue, nil: there is no area.
func (a *inflightArea) of(queue, size int, packed bool) ([]byte, error) {
	if a.bytes == nil {
		return nil, nil
	}
	n := virtio.InflightSize(a.queueSize, packed)
	if queue >= a.queues || size > a.queueSize || (queue+1)*n > len(a.area) {
		return nil, fmt.Errorf("the area for requests in flight has no room for queue %d of size %d", queue, size)
	}
	return a.area[queue*n:][:n:n], nil
}

func (a *inflightArea) close() {
	if a.bytes != nil {
		unix.Munmap(a.bytes)
	}
	*a = inflightArea{}
}

// newInflight makes an area, of zeroes, and its descriptor.
func newInflight(i *vhostwire.Inflight) (fd int, err error) {
	if i.Queues == 0 || i.QueueSize == 0 || int(i.Queues) > maxRings || int(i.QueueSize) > virtio.MaxQueueSize {
		return -1, errors.New("requests in flight of no queues, or of too many")
	}
	// The larger of the two layouts, as the front end may not have said yet which one it wants.
	i.Size, i.Offset = uint64(int(i.Queues)*virtio.InflightSize(int(i.QueueSize), true)), 0
	fd, err = unix.MemfdCreate("vhost-user-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	if err = unix.Ftruncate(fd, int64(i.Size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// dirtyLog is where the pages of the guest are marked that the device has written, for migration.
// Its log belongs to the message loop.
type dirtyLog struct {
	log *virtio.Log // nil: none

	mu sync.Mutex
	// what the front end is told by that there is something in it; -1: nothing
	fd int // +checklocks:mu
}

// set makes a log of what comes with SetLogBase; the one before is returned, to be released when
// nobody uses it any more.
func (l *dirtyLog) set(fd int, w vhostwire.Log) (before *virtio.Log, err error) {
	b, mapped, err := mapShared(fd, w.Offset, w.Size)
	if err != nil {
		return nil, err
	}
	m := virtio.NewMapping(b, func([]byte) { unix.Munmap(mapped) })
	defer m.Release()
	log, err := virtio.NewLog(m)
	if err != nil {
		return nil, err
	}
	before, l.log = l.log, log
	return before, nil
}

// setFD makes fd, which is taken, what the front end is told by; -1: nothing.
func (l *dirtyLog) setFD(fd int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	l.fd = fd
}

// tell tells the front end that there may be something in the log.
func (l *dirtyLog) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	signal(l.fd)
}

func (l *dirtyLog) close() {
	l.setFD(-1)
	if l.log != nil {
		l.log.Release()
		l.log = nil
	}
}
