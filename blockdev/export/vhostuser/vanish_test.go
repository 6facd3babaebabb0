package vhostuser

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
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

// What is shared beside the guest's memory vanishes: the area of what is in flight, and the log of
// what was written. That is the end of the queue, and of nothing else, too.
func TestTruncatedBeside(t *testing.T) {
	const size = 1 << 20
	for name, share := range map[string]func(m *machine, fd int){
		"area": func(m *machine, fd int) {
			a := vhostwire.Inflight{Size: size, Queues: 1, QueueSize: queueSize, Padded: true}
			m.ack(&vhostwire.Message{Request: vhostwire.SetInflightFD, Inflight: a}, fd)
		},
		"log": func(m *machine, fd int) {
			m.send(&vhostwire.Message{Request: vhostwire.SetLogBase, Log: vhostwire.Log{Size: size}}, 0, fd)
			if _, err := m.reply(vhostwire.SetLogBase); err != nil {
				t.Fatal(err)
			}
			features := m.features | vhostwire.FProtocolFeatures | vhostwire.FLogAll
			m.ack(&vhostwire.Message{Request: vhostwire.SetFeatures, Number: features})
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := unix.Ftruncate(fd, size); err != nil {
				t.Fatal(err)
			}
			m := f.connect()
			m.negotiate(virtio.BlkFFlush)
			m.guest = virtiotest.NewGuest(t, 16<<20)
			m.share()
			share(m, fd)
			q := m.newQueue(0)
			m.start(q, 0)
			if s, _ := q.do(reqIn, 0, nil, 4096); s != 0 {
				t.Fatalf("status %d", s)
			}
			wrong := m.eventfd()
			m.ack(&vhostwire.Message{Request: vhostwire.SetVringErr}, wrong)
			if err := unix.Ftruncate(fd, 0); err != nil {
				t.Fatal(err)
			}
			q.put(reqIn, 0, nil, 4096)
			p := []unix.PollFd{{Fd: int32(wrong), Events: unix.POLLIN}}
			if n, err := unix.Poll(p, int(patience.Milliseconds())); n != 1 {
				t.Fatalf("no error is told: %v", err)
			}
			m.c.Close()
			if s, _ := f.boot(1, virtio.BlkFFlush).queues[0].do(reqIn, 0, nil, 4096); s != 0 {
				t.Errorf("status %d", s)
			}
		})
	}
}
