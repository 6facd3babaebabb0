package vhostuser

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// zeroing is a disk whose driver writes to the guest's memory itself, with a lock held.
type zeroing struct {
	*drivertest.Fault
	mu *sync.Mutex
}

func (z zeroing) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	z.mu.Lock()
	v.Zero()
	z.mu.Unlock()
	return nil
}

// Memory of a request vanishes while a driver works on it: that is the end of the queue, and of
// nothing else.
func TestTruncatedUnderDriver(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("there is no handler of faults here")
	}
	f := newExport(t, func(d *drivertest.Fault) graph.Driver { return zeroing{d, new(sync.Mutex)} })
	for range 2 {
		m := f.boot(1, virtio.BlkFFlush)
		q := m.queues[0]
		if s, _ := q.do(reqIn, 0, make([]byte, 4096), 4096); s != 0 {
			t.Fatalf("status %d", s)
		}
		wrong := m.eventfd()
		m.ack(&vhostwire.Message{Request: vhostwire.SetVringErr}, wrong)
		q.slot = slots - 1
		end := (q.data - m.guest.Base + slotData) &^ 4095
		if err := unix.Ftruncate(m.guest.FD, int64(end)); err != nil {
			t.Fatal(err)
		}
		// Nothing of the front end's is written behind the end: only the device touches that.
		q.put(reqIn, 0, nil, slotData)
		p := []unix.PollFd{{Fd: int32(wrong), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, int(patience.Milliseconds())); n != 1 {
			t.Fatalf("no error is told: %v", err)
		}
		m.c.Close()
	}
	if s, _ := f.boot(1, virtio.BlkFFlush).queues[0].do(reqIn, 0, make([]byte, 4096), 4096); s != 0 {
		t.Errorf("status %d", s)
	}
}
