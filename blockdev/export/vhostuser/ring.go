package vhostuser

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/events/panics"
)

// ring is a virtqueue as the front end has set it up, and while it runs, the goroutine that serves
// it. Without a comment fields are the message loop's, and constant while it runs.
//
//	         SET_VRING_KICK, _ENABLE 1
//	stopped ---------------------------> running ---broken ring---> broken
//	   ^                                    |                         |
//	   +--- GET_VRING_BASE, _ENABLE 0, -----+-------------------------+
//	        reset, the front end has gone
type ring struct {
	f     *front
	index int

	size    int
	addr    vhostwire.Addr
	base    uint32
	enabled bool
	kick    *kick // nil: none yet
	// features are those negotiated when it was started; anybody's.
	features uint64

	done   chan struct{} // nil: stopped; closed when the goroutine has ended
	ctx    context.Context
	cancel context.CancelFunc
	// stopping: ctx is done.
	stopping atomic.Bool

	mu   sync.Mutex
	idle sync.Cond // q has nothing in flight, with mu
	// nil: stopped
	queue *virtio.Queue // +checklocks:mu
	// not in use
	free []*request // +checklocks:mu
	// to tell the driver of what is done; -1: none
	call int // +checklocks:mu
	// to tell it of what is wrong; -1: none
	err int // +checklocks:mu
	// what queue writes is logged
	logs bool // +checklocks:mu
	// something is staged in queue
	staged bool // +checklocks:mu
}

func newRing(f *front, index int) *ring {
	r := &ring{f: f, index: index, call: -1, err: -1}
	r.enabled = f.features != 0 && f.features&vhostwire.FProtocolFeatures == 0
	r.idle.L = &r.mu
	return r
}

// running tells whether r is not stopped.
func (r *ring) running() bool { return r.done != nil }

// change calls f, which changes what may not change while r runs.
func (r *ring) change(f func()) error {
	if r.running() {
		return fmt.Errorf("queue %d is in use", r.index)
	}
	f()
	return nil
}

// setAddr says where r is.
func (r *ring) setAddr(a vhostwire.Addr) error {
	if !r.running() {
		r.addr = a
		return nil
	}
	if a.Desc != r.addr.Desc || a.Used != r.addr.Used || a.Avail != r.addr.Avail {
		return fmt.Errorf("queue %d is in use", r.index)
	}
	r.addr = a
	r.setLog()
	return nil
}

// setLog has r log what it writes, or not, as the front end has asked last.
func (r *ring) setLog() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.queue == nil {
		return
	}
	if r.logs = r.f.features&vhostwire.FLogAll != 0 && r.f.log.log != nil; r.logs {
		r.queue.SetLog(r.f.log.log, r.addr.Flags&vhostwire.RingLog != 0, r.addr.Log)
	} else {
		r.queue.SetLog(nil, false, 0)
	}
}

// enable lets r run, or stops it.
func (r *ring) enable(on bool) error {
	r.enabled = on
	if !on {
		r.stop()
		return nil
	}
	return r.start()
}

// setKick makes fd, which is taken, what r is kicked by, and starts it: its driver may have kicked
// already.
func (r *ring) setKick(fd int) error {
	k, err := newKick(fd)
	if err != nil {
		return err
	}
	r.stop()
	r.dropKick()
	r.kick = k
	return r.start()
}

func (r *ring) dropKick() {
	if r.kick != nil {
		r.kick.close()
		r.kick = nil
	}
}

// setNotifier makes fd, which is taken unless it is -1, what the driver is told by. The driver is
// told at once: what was used before may have been told to nobody.
func (r *ring) setNotifier(what vhostwire.Request, fd int) error {
	if fd >= 0 {
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &r.call
	if what == vhostwire.SetVringErr {
		p = &r.err
	}
	if *p >= 0 {
		unix.Close(*p)
	}
	*p = fd
	if p == &r.call {
		signal(fd)
	}
	return nil
}

// signal makes an eventfd readable; it does not wait.
func signal(fd int) {
	if fd >= 0 {
		var one [8]byte
		binary.NativeEndian.PutUint64(one[:], 1)
		unix.Write(fd, one[:])
	}
}

// start lets r run if all is there that it needs.
func (r *ring) start() error {
	if r.running() || !r.enabled || r.kick == nil || r.size == 0 || r.f.mem.table == nil {
		return nil
	}
	if r.f.features&virtio.FVersion1 == 0 {
		return fmt.Errorf("queue %d has a driver from before virtio 1.0", r.index)
	}
	inflight, err := r.f.inflight.of(r.index, r.size, r.f.features&virtio.FPacked != 0)
	if err != nil {
		return err
	}
	q, err := virtio.NewQueue(virtio.QueueConfig{
		Size: r.size, Features: r.f.features, Memory: r.f.mem.table, Base: r.base, Inflight: inflight,
		Rings: virtio.Rings{Desc: r.addr.Desc, Driver: r.addr.Avail, Device: r.addr.Used},
	})
	if err != nil {
		return err
	}
	r.features = r.f.features
	r.ctx, r.cancel = context.WithCancel(r.f.ctx)
	r.stopping.Store(false)
	r.kick.rearm()
	r.done = make(chan struct{})
	r.mu.Lock()
	r.queue = q
	signal(r.call)
	r.mu.Unlock()
	r.setLog()
	panics.Go("a vhost-user queue", r.run, func(error) { r.f.kill() })
	return nil
}

// stop stops r when its requests have ended, and returns where it stands.
func (r *ring) stop() uint32 {
	if !r.running() {
		return r.base
	}
	r.stopping.Store(true)
	r.cancel()
	r.kick.wake()
	<-r.done
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.queue.InFlight() > 0 {
		r.idle.Wait()
	}
	r.publishLocked()
	r.base = r.queue.Base()
	r.queue.Close()
	r.queue, r.done, r.free = nil, nil, nil
	return r.base
}

// close stops r for good.
func (r *ring) close() {
	r.stop()
	r.dropKick()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range []*int{&r.call, &r.err} {
		if *p >= 0 {
			unix.Close(*p)
			*p = -1
		}
	}
}

// setMemory has r use another table. A ring that is not in it is broken.
func (r *ring) setMemory(m *virtio.Memory) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.queue == nil || r.queue.Err() != nil {
		return nil
	}
	return r.queue.SetMemory(m)
}

// broken ends the service of r, whose driver has to be reset.
func (r *ring) broken(err error) {
	r.f.s.log.Warn("vhost-user queue is broken", "queue", r.index, "err", err)
	r.mu.Lock()
	defer r.mu.Unlock()
	signal(r.err)
}

// publishLocked shows the driver what is staged.
// +checklocks:r.mu
func (r *ring) publishLocked() {
	if !r.staged {
		return
	}
	r.staged = false
	if notify, _ := r.queue.Publish(); notify { // errors are those of the next pop
		signal(r.call)
	}
	if r.logs {
		r.f.log.tell()
	}
}
