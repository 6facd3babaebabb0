package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"qblockd/blockdev/vhostwire"
	"qblockd/events/panics"
)

// protocol is what of the protocol's features there is.
const protocol = vhostwire.ProtoMQ | vhostwire.ProtoLogShmFD | vhostwire.ProtoReplyAck | vhostwire.ProtoBackendReq |
	vhostwire.ProtoConfig | vhostwire.ProtoInflightShmFD | vhostwire.ProtoResetDevice |
	vhostwire.ProtoConfigureMemSlot | vhostwire.ProtoStatus

// maxRings is how many rings messages can name when they bring descriptors.
const maxRings = int(vhostwire.RingIndexMask) + 1

// front is a front end: its connection, and the device as it has set it up. Its fields belong to
// the message loop, but what is said to be anybody's.
type front struct {
	s  *server
	ch *channel

	// ctx is done when the front end has hung up, or is dropped: who waits for a gate on its behalf
	// gives up. Anybody's.
	ctx    context.Context
	cancel context.CancelFunc

	features uint64 // as negotiated
	protocol uint64
	status   uint64
	mem      memory
	inflight inflightArea
	log      dirtyLog
	rings    []*ring // by index; nil: nothing was said about it
	workers  workers
	back     backChannel
	all      panics.Group // goroutines beside those of rings and workers
}

func newFront(s *server, nc *net.UnixConn) *front {
	f := &front{s: s, ch: newChannel(nc), rings: make([]*ring, min(int(s.queues), maxRings))}
	f.ctx, f.cancel = context.WithCancel(s.ctx)
	f.back.fd, f.log.fd = -1, -1 // +checklocksignore: nobody knows it yet
	f.workers.init()
	return f
}

// kill drops the front end: its connection ends, whoever waits for a gate for it gives up. Callable
// from anywhere, any number of times.
func (f *front) kill() {
	f.cancel()
	// Not Close, which the message loop does; a reply may wait for a front end that reads none.
	f.ch.nc.CloseRead()
	f.ch.nc.CloseWrite()
}

// run handles messages until the front end has hung up, or is dropped.
func (f *front) run() {
	f.all.Go("the size of a vhost-user disk", f.watchSize)
	err := f.messages()
	switch {
	case errors.Is(err, io.EOF):
		f.s.log.Debug("vhost-user front end has hung up")
	case f.ctx.Err() == nil:
		f.s.log.Warn("vhost-user front end is dropped", "err", err)
	}
}

// messages is the message loop.
func (f *front) messages() (err error) {
	defer panics.Into("a vhost-user connection", &err)
	for {
		h, err := f.ch.read()
		if err != nil {
			return err
		}
		if err := f.message(h); err != nil {
			return fmt.Errorf("message %d: %w", h.Request, err)
		}
	}
}

// end gives back all that the front end has; its requests have ended then.
func (f *front) end() {
	f.cancel()
	f.ch.fds.close()
	for _, r := range f.rings {
		if r != nil {
			r.close()
		}
	}
	f.workers.wait()
	f.all.Wait()
	f.back.close()
	f.mem.close()
	f.inflight.close()
	f.log.close()
	f.ch.nc.Close()
	f.s.reset()
}

// ring is the ring of that index.
func (f *front) ring(index uint32) (*ring, error) {
	if index >= uint32(len(f.rings)) {
		return nil, fmt.Errorf("there is no queue %d", index)
	}
	if f.rings[index] == nil {
		f.rings[index] = newRing(f, int(index))
	}
	return f.rings[index], nil
}

// stopRings stops and disables all rings: a reset.
func (f *front) stopRings() {
	for _, r := range f.rings {
		if r != nil {
			r.stop()
			r.enabled = false
		}
	}
}

// memoryChanged makes the rings use the memory as it is now.
func (f *front) memoryChanged() error {
	for _, r := range f.rings {
		if r != nil {
			if err := r.setMemory(f.mem.table); err != nil {
				return err
			}
		}
	}
	return nil
}

// logChanged has the rings log what they write, or not, as the front end has asked last.
func (f *front) logChanged() {
	for _, r := range f.rings {
		if r != nil {
			r.setLog()
		}
	}
}

// watchSize tells the front end when the disk gets another size.
func (f *front) watchSize() {
	size := f.s.x.Size()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.s.x.Resized():
		}
		if now := f.s.x.Size(); now != size {
			size = now
			f.back.configChanged()
		}
	}
}
