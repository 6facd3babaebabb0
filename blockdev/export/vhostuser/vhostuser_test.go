package vhostuser

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/graph"
	"qblockd/schema/types"
)

var kinds = map[string]uint64{
	"split":           virtio.BlkFFlush,
	"split, indirect": virtio.BlkFFlush | virtio.FIndirect | virtio.FEventIdx,
	"packed":          virtio.BlkFFlush | virtio.FPacked | virtio.FIndirect | virtio.FEventIdx,
}

func TestRequests(t *testing.T) {
	for name, features := range kinds {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if features&virtio.FEventIdx != 0 {
				f = newSlow(t)
			}
			m := f.boot(2, features)
			for i := range 40 {
				m.check(uint64(16*i), byte(i+1))
			}
			q := m.queues[0]
			for _, c := range []struct {
				what   string
				typ    uint32
				sector uint64
				data   []byte
				want   byte
			}{
				{"flush", reqFlush, 0, nil, 0},
				{"zeroes", reqZero, 0, segment(2, 4, 1), 0},
				{"discard", reqDiscard, 0, segment(64, 8, 0), 0},
				{"zeroes beyond the end", reqZero, 0, segment(diskSize/512-1, 2, 0), 1},
				{"a discard with a flag", reqDiscard, 0, segment(0, 8, 1), 2},
				{"a read of no sectors at the end", reqIn, diskSize / 512, nil, 0},
				{"a read beyond the end", reqIn, diskSize/512 - 1, make([]byte, 1024), 1},
				{"a write beyond the end", reqOut, 1 << 60, make([]byte, 512), 1},
				{"an unknown request", 99, 0, nil, 2},
			} {
				if s, _ := q.do(c.typ, c.sector, c.data, len(c.data)); s != c.want {
					t.Errorf("%s: status %d, want %d", c.what, s, c.want)
				}
			}
			want := bytes.Repeat([]byte{1}, 8192)
			clear(want[2*512 : 6*512])
			if s, got := q.do(reqIn, 0, nil, 8192); s != 0 || !bytes.Equal(got, want) {
				t.Errorf("status %d, %x after zeroing", s, got[1000:1050])
			}
			if s, got := q.do(reqGetID, 0, nil, 20); s != 0 || string(got[:15]) != serial+"\x00" {
				t.Errorf("status %d, serial number %q", s, got)
			}
		})
	}
}

// Requests that have to wait do not keep others waiting, and end in their own order.
func TestWorkers(t *testing.T) {
	f := newSlow(t)
	m := f.boot(1, kinds["packed"])
	release := make(chan struct{})
	f.disk.Hook(func(op drivertest.Op, off, n int64) {
		if op == drivertest.OpRead && off == 0 {
			<-release
		}
	})
	q := m.queues[0]
	stuck := q.put(reqIn, 0, nil, 512)
	for range 3 {
		if slot, s := func() (int, byte) { q.put(reqIn, 8, nil, 512); return q.used() }(); slot == stuck || s != 0 {
			t.Fatalf("slot %d, status %d", slot, s)
		}
	}
	close(release)
	if slot, s := q.used(); slot != stuck || s != 0 {
		t.Fatalf("slot %d, status %d", slot, s)
	}
}

// Large writes that come together are carried out at the same time.
func TestLargeWrites(t *testing.T) {
	f := newFixture(t)
	m := f.boot(1, kinds["packed"])
	q := m.queues[0]
	undrain := drain(f)
	q.put(reqOut, 0, nil, large)
	q.slot = large / slotData
	q.put(reqOut, large/512, nil, large)
	var inside atomic.Int32
	both := make(chan struct{})
	f.disk.Hook(func(op drivertest.Op, off, n int64) {
		if op != drivertest.OpWrite {
			return
		}
		if inside.Add(1) == 2 {
			close(both)
		}
		select {
		case <-both:
		case <-time.After(patience):
			t.Error("one write waits for the other")
		}
	})
	undrain()
	for range 2 {
		if _, s := q.used(); s != 0 {
			t.Fatalf("status %d", s)
		}
	}
}

// While the node is drained requests stay in the ring; a ring that is stopped meanwhile leaves them
// there.
func TestDrained(t *testing.T) {
	f := newFixture(t)
	m := f.boot(1, kinds["split, indirect"])
	q := m.queues[0]
	undrain := drain(f)
	slot := q.put(reqIn, 0, nil, 512)
	if base := m.stop(q); base != 0 {
		t.Errorf("a ring whose export is drained stands at %d", base)
	}
	m.start(q, 0)
	undrain()
	if done, s := q.used(); done != slot || s != 0 {
		t.Fatalf("slot %d, status %d", done, s)
	}
	if base := m.stop(q); base != 1 {
		t.Errorf("after one request the ring stands at %d", base)
	}
	m.start(q, 1)
	m.check(0, 7)
}

// drain closes the gate of the disk until undrain is called.
func drain(f *fixture) (undrain func()) {
	f.t.Helper()
	undrain, err := f.g.Drain(f.t.Context(), f.g.Node("disk"))
	if err != nil {
		f.t.Fatal(err)
	}
	return undrain
}

// A front end that hangs up, or is dropped, leaves nothing: not its requests, nor descriptors.
func TestReconnect(t *testing.T) {
	f := newSlow(t)
	before := descriptorsOpen(t)
	for i := range 50 {
		m := f.boot(2, kinds["packed"])
		m.check(uint64(i), byte(i+1))
		if i%2 == 0 {
			m.queues[0].put(reqIn, 0, nil, 512)
		}
		m.c.Close()
		for _, q := range m.queues {
			unix.Close(q.kick)
			unix.Close(q.call)
			q.kick, q.call = -1, -1
		}
	}
	m := f.connect()
	m.number(vhostwire.GetFeatures) // those before have gone
	m.c.Close()
	eventually(t, "all descriptors are closed", func() bool { return descriptorsOpen(t)-before < 60 })
}

func descriptorsOpen(t *testing.T) int {
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so: %s", what)
		}
	}
}

func TestConfig(t *testing.T) {
	f := newFixture(t, func(o *types.BlockExportOptions) {
		size := uint64(4096)
		o.U.(*types.BlockExportOptionsVhostUserBlk).LogicalBlockSize = &size
	})
	m := f.boot(1, virtio.BlkFFlush|virtio.BlkFConfigWCE)
	c := m.config()
	if n := binary.LittleEndian.Uint64(c); n != diskSize/512 {
		t.Errorf("capacity %d", n)
	}
	le := binary.LittleEndian
	if c[virtio.BlkConfigWCE] != 1 || le.Uint32(c[20:]) != 4096 || le.Uint16(c[34:]) != 2 {
		t.Errorf("configuration %x", c)
	}
	if s, _ := m.queues[0].do(reqIn, 1, nil, 4096); s != 1 {
		t.Errorf("a read at half a block: status %d", s)
	}
	if s, _ := m.queues[0].do(reqIn, 0, nil, 512); s != 1 {
		t.Errorf("a read of half a block: status %d", s)
	}
	m.setCache(0)
	if m.config()[virtio.BlkConfigWCE] != 0 {
		t.Error("the cache is still on")
	}
	for _, c := range []vhostwire.Config{
		{Offset: virtio.BlkConfigSize, Data: []byte{0}}, {Offset: 1, Data: make([]byte, virtio.BlkConfigSize)}} {
		m.send(&vhostwire.Message{Request: vhostwire.GetConfig, Config: c}, 0)
		if b, err := m.reply(vhostwire.GetConfig); err != nil || len(b) != 0 {
			t.Errorf("a part of the configuration that is not there: %x, %v", b, err)
		}
	}
	capacity := vhostwire.Config{Data: []byte{0}}
	if code, _ := m.try(&vhostwire.Message{Request: vhostwire.SetConfig, Config: capacity}); code != 1 {
		t.Errorf("the capacity was written: code %d", code)
	}
	m.dropped()
}

// Writes are durable when they are acknowledged if the guest does not flush, or has no cache.
func TestDurable(t *testing.T) {
	for _, c := range []struct {
		features uint64
		wce      byte
		want     bool
	}{
		{virtio.BlkFFlush, 1, false}, {0, 1, true}, {virtio.BlkFFlush | virtio.BlkFConfigWCE, 0, true},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			f := newFixture(t)
			m := f.boot(1, c.features)
			m.setCache(c.wce)
			flushes := 0
			f.disk.Hook(func(op drivertest.Op, off, n int64) {
				if op == drivertest.OpFlush {
					flushes++
				}
			})
			if s, _ := m.queues[0].do(reqOut, 0, make([]byte, 512), 512); s != 0 || (flushes > 0) != c.want {
				t.Errorf("status %d, %d flushes", s, flushes)
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	f := newFixture(t, func(o *types.BlockExportOptions) { o.Writable = nil })
	m := f.connect()
	if m.number(vhostwire.GetFeatures)&virtio.BlkFReadOnly == 0 {
		t.Error("the disk does not say that it is read-only")
	}
	m = nil
	f2 := newFixture(t, func(o *types.BlockExportOptions) { o.Writable = nil })
	m = f2.boot(1, virtio.BlkFFlush)
	for typ, data := range map[uint32][]byte{
		reqOut: make([]byte, 512), reqZero: segment(0, 1, 0), reqDiscard: segment(0, 1, 0)} {
		if s, _ := m.queues[0].do(typ, 0, data, len(data)); s != 1 {
			t.Errorf("request %d: status %d", typ, s)
		}
	}
}

// Another size is told, and holds at once.
func TestResize(t *testing.T) {
	f := newFixture(t)
	m := f.boot(1, virtio.BlkFFlush)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	m.ack(&vhostwire.Message{Request: vhostwire.SetBackendReqFD}, pair[1])
	unix.Close(pair[1])
	drivertest.AddNode(t, f.g, "larger", drivertest.NewMemFile(2*diskSize))
	if err := f.g.Do(t.Context(), func(tx *graph.Tx) error {
		return tx.ReplaceNode(f.g.Node("disk"), f.g.Node("larger"))
	}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := unix.Read(pair[0], b)
	if want := vhostwire.AppendHeader(nil, vhostwire.BackendConfigChange, 0, 0); err != nil || !bytes.Equal(b[:n], want) {
		t.Errorf("%x, %v was told, not %x", b[:n], err, want)
	}
	if n := binary.LittleEndian.Uint64(m.config()); n != 2*diskSize/512 {
		t.Errorf("capacity %d", n)
	}
	if s, _ := m.queues[0].do(reqOut, diskSize/512, make([]byte, 512), 512); s != 0 {
		t.Errorf("a write behind the old end: status %d", s)
	}
}

// What a front end must not send ends its connection, and only that.
func TestWrongMessages(t *testing.T) {
	f := newFixture(t)
	for what, send := range map[string]func(m *machine){
		"garbage": func(m *machine) { m.c.Write(bytes.Repeat([]byte{0xff}, 100)) },
		"a cut message": func(m *machine) {
			m.c.Write(vhostwire.AppendHeader(nil, vhostwire.SetFeatures, 0, 8))
			m.c.CloseWrite()
		},
		"unknown features": func(m *machine) { m.send(&vhostwire.Message{Request: vhostwire.SetFeatures, Number: 1 << 63}, 0) },
		"queue 2 of 2": func(m *machine) {
			m.send(&vhostwire.Message{Request: vhostwire.SetVringEnable, State: vhostwire.State{Index: 2, Num: 1}}, 0)
		},
		"an empty region": func(m *machine) {
			m.send(&vhostwire.Message{Request: vhostwire.SetMemTable, Regions: make([]vhostwire.Region, 1)}, 0, m.guest.FD)
		},
		"a region of a descriptor that is none of memory": func(m *machine) {
			r := []vhostwire.Region{{Size: 4096}}
			m.send(&vhostwire.Message{Request: vhostwire.AddMemReg, Regions: r}, 0, m.queues[0].kick)
		},
		"a region that is there": func(m *machine) {
			m.send(&vhostwire.Message{Request: vhostwire.AddMemReg, Regions: []vhostwire.Region{
				{Guest: m.guest.Base, User: m.guest.User, Size: 4096}}}, 0, m.guest.FD)
		},
		"nine descriptors": func(m *machine) {
			l := make([]int, 9)
			for i := range l {
				l[i] = m.guest.FD
			}
			m.send(&vhostwire.Message{Request: vhostwire.GetFeatures}, 0, l...)
		},
		"a ring elsewhere": func(m *machine) {
			m.stop(m.queues[0])
			m.send(&vhostwire.Message{Request: vhostwire.SetVringAddr, Addr: vhostwire.Addr{Desc: 16, Used: 16, Avail: 16}}, 0)
			m.send(&vhostwire.Message{Request: vhostwire.SetVringKick}, 0, m.queues[0].kick)
		},
		"kicks by a file": func(m *machine) {
			file, err := os.Create(filepath.Join(t.TempDir(), "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			m.send(&vhostwire.Message{Request: vhostwire.SetVringKick, Number: 1}, 0, int(file.Fd()))
		},
	} {
		t.Run(what, func(t *testing.T) {
			m := f.boot(1, virtio.BlkFFlush)
			m.t = t
			m.check(0, 1)
			send(m)
			m.dropped()
			m.c.Close()
		})
	}
	f.boot(1, virtio.BlkFFlush).check(0, 9)
}

// A ring that is broken is told to the front end; other rings and front ends go on.
func TestBrokenRing(t *testing.T) {
	f := newFixture(t)
	m := f.boot(2, virtio.BlkFFlush)
	q := m.queues[1]
	wrong := m.eventfd()
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringErr, Number: 1}, wrong)
	// A head that is no descriptor.
	m.guest.Store16(q.d.Drv+4, 0xffff)
	m.guest.Store16(q.d.Drv+2, 1)
	signal(q.kick)
	p := []unix.PollFd{{Fd: int32(wrong), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, int(patience.Milliseconds())); n != 1 {
		t.Fatalf("no error is told: %v", err)
	}
	m.queues = m.queues[:1]
	m.check(0, 3)
	m.stop(q)
	m.check(8, 4)
}

// Memory that is truncated under a ring breaks that ring, not the daemon.
func TestTruncatedMemory(t *testing.T) {
	f := newFixture(t)
	m := f.boot(1, virtio.BlkFFlush)
	m.check(0, 1)
	q := m.queues[0]
	wrong := m.eventfd()
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringErr}, wrong)
	if err := unix.Ftruncate(m.guest.FD, 0); err != nil {
		t.Fatal(err)
	}
	signal(q.kick)
	p := []unix.PollFd{{Fd: int32(wrong), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, int(patience.Milliseconds())); n != 1 {
		t.Fatalf("no error is told: %v", err)
	}
	m.c.Close()
	f.boot(1, virtio.BlkFFlush).check(0, 2)
}

// Memory comes and goes while rings run.
func TestMemorySlots(t *testing.T) {
	f := newSlow(t)
	m := f.boot(1, virtio.BlkFFlush)
	if n := m.number(vhostwire.GetMaxMemSlots); n != maxSlots {
		t.Errorf("%d slots", n)
	}
	r := []vhostwire.Region{{Guest: 1 << 40, User: 1 << 40, Size: 1 << 20, Offset: 1 << 20}}
	for i := range 5 {
		m.ack(&vhostwire.Message{Request: vhostwire.AddMemReg, Regions: r}, m.guest.FD)
		m.check(uint64(i), byte(i))
		m.ack(&vhostwire.Message{Request: vhostwire.RemMemReg, Regions: r})
		m.check(uint64(i), byte(i+1))
		m.share()
	}
	code, _ := m.try(&vhostwire.Message{Request: vhostwire.RemMemReg, Regions: r})
	if code != 1 {
		t.Error("a region was removed that is not there")
	}
	m.dropped()
}

// A reset stops all rings.
func TestReset(t *testing.T) {
	f := newFixture(t)
	m := f.boot(2, kinds["packed"])
	m.check(0, 1)
	m.ack(&vhostwire.Message{Request: vhostwire.SetStatus, Number: 15})
	if n := m.number(vhostwire.GetStatus); n != 15 {
		t.Errorf("status %d", n)
	}
	for _, msg := range []*vhostwire.Message{{Request: vhostwire.ResetDevice}, {Request: vhostwire.SetStatus}} {
		m.ack(msg)
		bases := []uint32{m.stop(m.queues[0]), m.stop(m.queues[1])}
		for i, q := range m.queues {
			m.start(q, bases[i])
		}
		m.check(8, 2)
	}
}

// Removing the export drops the front end, and requests in the node end first.
func TestRemoval(t *testing.T) {
	f := newSlow(t)
	m := f.boot(1, virtio.BlkFFlush)
	release, reached := make(chan struct{}), make(chan struct{})
	f.disk.Hook(func(op drivertest.Op, off, n int64) {
		if op == drivertest.OpRead {
			close(reached)
			<-release
		}
	})
	slot := m.queues[0].put(reqIn, 0, nil, 512)
	<-reached
	if err := f.table.Del(t.Context(), "e", types.BlockExportRemoveModeSafe); err != nil {
		t.Fatal(err)
	}
	if l := f.table.Query(); len(l) != 1 || !l[0].ShuttingDown {
		t.Errorf("%v while a request is under way", l)
	}
	close(release)
	m.dropped()
	eventually(t, "the export has gone", func() bool { return len(f.table.Query()) == 0 })
	if done, s := m.queues[0].used(); done != slot || s != 0 {
		t.Errorf("slot %d, status %d", done, s)
	}
	if _, err := os.Stat(f.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}
