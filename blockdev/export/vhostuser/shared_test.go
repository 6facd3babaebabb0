package vhostuser

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
	"qblockd/schema/types"
)

// getInflight asks for an area, and returns its descriptor and what is said of it.
func (m *machine) getInflight() (int, vhostwire.Inflight) {
	m.t.Helper()
	ask := vhostwire.Message{Request: vhostwire.GetInflightFD,
		Inflight: vhostwire.Inflight{Queues: 2, QueueSize: queueSize, Padded: true}}
	m.send(&ask, 0)
	b, oob := make([]byte, vhostwire.HeaderSize+24), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := m.c.ReadMsgUnix(b, oob)
	if err != nil || n != len(b) {
		m.t.Fatalf("%d bytes, %v", n, err)
	}
	list, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(list) != 1 {
		m.t.Fatalf("%d control messages, %v", len(list), err)
	}
	fds, err := unix.ParseUnixRights(&list[0])
	if err != nil || len(fds) != 1 {
		m.t.Fatalf("%d descriptors, %v", len(fds), err)
	}
	m.t.Cleanup(func() { unix.Close(fds[0]) })
	ask.Inflight.Size = binary.NativeEndian.Uint64(b[vhostwire.HeaderSize:])
	return fds[0], ask.Inflight
}

// What a front end leaves in flight when its connection ends is performed for the next connection,
// in the same order, and nothing else.
func TestInflight(t *testing.T) {
	for name, features := range kinds {
		t.Run(name, func(t *testing.T) {
			id := "io"
			f := newSlow(t, func(o *types.BlockExportOptions) { o.Iothread = &id })
			m := f.connect()
			m.negotiate(features)
			m.guest = virtiotest.NewGuest(f.t, 16<<20)
			m.share()
			fd, area := m.getInflight()
			m.ack(&vhostwire.Message{Request: vhostwire.SetInflightFD, Inflight: area}, fd)
			q := m.newQueue(0)
			m.start(q, 0)
			// They are popped, and wait for a worker.
			const count = 3
			for i := range count {
				q.put(reqOut, uint64(i), filled(byte(10+i)), 512)
				<-f.group.entered
			}
			m.c.Close()
			m.c = f.connect().c
			m.number(vhostwire.GetFeatures) // the one before has gone
			close(f.group.open)
			m.negotiate(features)
			m.share()
			m.ack(&vhostwire.Message{Request: vhostwire.SetInflightFD, Inflight: area}, fd)
			base := uint32(99) // what it says does not count
			if features&virtio.FPacked != 0 {
				base = q.d.Base()
			}
			m.start(q, base)
			seen := map[int]bool{}
			for range count {
				slot, status := q.used()
				if seen[slot] || status != 0 {
					t.Errorf("slot %d: status %d, or twice", slot, status)
				}
				seen[slot] = true
			}
			for i := range count {
				if s, got := q.do(reqIn, uint64(i), nil, 512); s != 0 || !bytes.Equal(got, filled(byte(10+i))) {
					t.Errorf("sector %d: status %d, %x", i, s, got[:4])
				}
			}
			m.check(16, 5)
		})
	}
}

func filled(b byte) []byte {
	d := make([]byte, 512)
	for i := range d {
		d[i] = b
	}
	return d
}

// A front end that migrates finds the pages in the log that its requests have written.
func TestLog(t *testing.T) {
	f := newFixture(t)
	m := f.boot(1, virtio.BlkFFlush)
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	pages := (m.guest.Base + uint64(len(m.guest.Mem))) / 4096
	size := int(pages/8+8) &^ 7
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	log := virtiotest.Map(t, fd, size)
	marked := func(at uint64) bool { return log[at/4096/8]&(1<<(at/4096%8)) != 0 }
	m.send(&vhostwire.Message{Request: vhostwire.SetLogBase, Log: vhostwire.Log{Size: uint64(size)}}, 0, fd)
	if b, err := m.reply(vhostwire.SetLogBase); err != nil || len(b) != 8 {
		t.Fatalf("%x, %v", b, err)
	}
	told := m.eventfd()
	m.ack(&vhostwire.Message{Request: vhostwire.SetLogFD}, told)
	q := m.queues[0]
	m.check(0, 1)
	if marked(q.data) {
		t.Error("it is logged before that is asked for")
	}
	features := m.features | vhostwire.FProtocolFeatures
	m.ack(&vhostwire.Message{Request: vhostwire.SetFeatures, Number: features | vhostwire.FLogAll})
	rings := q.d.Rings()
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringAddr, Addr: vhostwire.Addr{Flags: vhostwire.RingLog,
		Desc: rings.Desc, Avail: rings.Driver, Used: rings.Device, Log: q.d.Dev}})
	if s, _ := q.do(reqOut, 0, filled(3), 512); s != 0 {
		t.Fatalf("status %d", s)
	}
	if written := q.data + uint64((q.slot-1)%slots*slotData); marked(written) || !marked(q.stat) || !marked(q.d.Dev) {
		t.Errorf("after a write: data %v, status %v, used ring %v", marked(written), marked(q.stat), marked(q.d.Dev))
	}
	s, _ := q.do(reqIn, 0, nil, 8192)
	read := q.data + uint64((q.slot-1)%slots*slotData)
	if s != 0 || !marked(read) || !marked(read+4096) || marked(read+8192) {
		t.Errorf("after a read of two pages: status %d, %v %v %v", s, marked(read), marked(read+4096), marked(read+8192))
	}
	var b [8]byte
	if n, err := unix.Read(told, b[:]); n != 8 {
		t.Errorf("the front end is not told: %v", err)
	}
	m.ack(&vhostwire.Message{Request: vhostwire.SetFeatures, Number: features})
	clear(log)
	if s, _ := q.do(reqIn, 0, nil, 4096); s != 0 || marked(q.data+uint64((q.slot-1)%slots*slotData)) {
		t.Errorf("status %d, or still logged", s)
	}
}
