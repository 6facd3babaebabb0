package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

const (
	diskSize = 4 << 20
	patience = 20 * time.Second
)

// slow is a disk each request to which has to wait.
type slow struct{ *drivertest.Fault }

func (s slow) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return s.Fault.ReadAt(r, v, off, f)
}

func (s slow) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return s.Fault.WriteAt(r, v, off, f)
}

// group lets nobody in until it is open.
type group struct{ entered, open chan struct{} }

func (g *group) Enter(ctx context.Context) error {
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *group) Leave() {}

// fixture is a disk that is exported.
type fixture struct {
	t     testing.TB
	g     *graph.Graph
	table *export.Table
	disk  *drivertest.Fault
	group *group // of exports in an iothread
	path  string
}

// newFixture exports a disk whose requests are served in line.
func newFixture(t testing.TB, change ...func(*types.BlockExportOptions)) *fixture {
	t.Helper()
	return newExport(t, func(d *drivertest.Fault) graph.Driver { return d }, change...)
}

// newSlow exports a disk whose requests have to wait.
func newSlow(t testing.TB, change ...func(*types.BlockExportOptions)) *fixture {
	t.Helper()
	return newExport(t, func(d *drivertest.Fault) graph.Driver { return slow{d} }, change...)
}

func newExport(
	t testing.TB, disk func(*drivertest.Fault) graph.Driver, change ...func(*types.BlockExportOptions),
) *fixture {
	t.Helper()
	f := &fixture{t: t, g: drivertest.NewGraph(t), path: filepath.Join(t.TempDir(), "s")}
	f.group = &group{entered: make(chan struct{}, 64), open: make(chan struct{})}
	f.table = export.New(f.g, export.Options{Iothread: func(string) export.Workers { return f.group }})
	NewType(f.table, Options{})
	t.Cleanup(func() { f.table.Close(context.Background()) })
	f.disk = drivertest.NewFault(drivertest.NewHostFile(t, diskSize))
	drivertest.AddNode(t, f.g, "disk", disk(f.disk))
	if err := f.add("e", change...); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) add(id string, change ...func(*types.BlockExportOptions)) error {
	yes, queues := true, uint16(2)
	o := &types.BlockExportOptions{Type: types.BlockExportTypeVhostUserBlk, ID: id, NodeName: "disk", Writable: &yes,
		U: &types.BlockExportOptionsVhostUserBlk{NumQueues: &queues, Addr: types.SocketAddress{
			Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: f.path}}}}
	for _, c := range change {
		c(o)
	}
	return f.table.Add(f.t.Context(), o)
}

// machine is a front end with a guest's driver.
type machine struct {
	t        testing.TB
	c        *net.UnixConn
	guest    *virtiotest.Guest
	features uint64
	queues   []*queue
}

// queue is one of the driver's.
type queue struct {
	m          *machine
	index      uint32
	d          *virtiotest.Driver
	kick, call int
	head, stat uint64 // guest addresses of headers and status bytes, one for each slot
	data       uint64
	slot       int
}

const (
	queueSize = 16
	slots     = 64
	slotData  = 64 << 10
)

// connect makes a front end that has said nothing yet.
func (f *fixture) connect() *machine {
	f.t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f.path})
	if err != nil {
		f.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	f.t.Cleanup(func() { c.Close() })
	return &machine{t: f.t, c: c}
}

// boot makes a front end whose guest has queues running, with these features beside version 1.
func (f *fixture) boot(queues int, features uint64) *machine {
	f.t.Helper()
	m := f.connect()
	m.negotiate(features)
	m.guest = virtiotest.NewGuest(f.t, 16<<20)
	m.share()
	for i := range queues {
		m.start(m.newQueue(i), 0)
	}
	return m
}

func (m *machine) negotiate(features uint64) {
	m.t.Helper()
	m.features = features | virtio.FVersion1
	m.ack(&vhostwire.Message{Request: vhostwire.SetOwner})
	m.send(&vhostwire.Message{Request: vhostwire.SetProtocolFeatures, Number: m.number(vhostwire.GetProtocolFeatures)}, 0)
	m.ack(&vhostwire.Message{Request: vhostwire.SetFeatures, Number: m.features | vhostwire.FProtocolFeatures})
}

// share tells where the guest's memory is.
func (m *machine) share() {
	m.t.Helper()
	m.ack(&vhostwire.Message{Request: vhostwire.SetMemTable, Regions: []vhostwire.Region{
		{Guest: m.guest.Base, User: m.guest.User, Size: uint64(len(m.guest.Mem))}}}, m.guest.FD)
}

func (m *machine) newQueue(i int) *queue {
	q := &queue{m: m, index: uint32(i), d: virtiotest.NewDriver(m.guest, queueSize, m.features)}
	q.kick, q.call = m.eventfd(), m.eventfd()
	q.head, q.stat = m.guest.Alloc(16*slots, 16), m.guest.Alloc(slots, 1)
	q.data = m.guest.Alloc(slots*slotData, 4096)
	m.queues = append(m.queues, q)
	return q
}

func (m *machine) eventfd() int {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// start has q served from base on; 0: from the beginning.
func (m *machine) start(q *queue, base uint32) {
	m.t.Helper()
	if base == 0 {
		base = q.d.Base()
	}
	rings := q.d.Rings()
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringNum, State: vhostwire.State{Index: q.index, Num: queueSize}})
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringBase, State: vhostwire.State{Index: q.index, Num: base}})
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringAddr, Addr: vhostwire.Addr{
		Index: q.index, Desc: rings.Desc, Avail: rings.Driver, Used: rings.Device}})
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringKick, Number: uint64(q.index)}, q.kick)
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringCall, Number: uint64(q.index)}, q.call)
	m.ack(&vhostwire.Message{Request: vhostwire.SetVringEnable, State: vhostwire.State{Index: q.index, Num: 1}})
}

// send sends a message.
func (m *machine) send(msg *vhostwire.Message, flags uint32, fds ...int) {
	m.t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := m.c.WriteMsgUnix(msg.Append(nil, flags), oob, nil); err != nil {
		m.t.Fatalf("message %d: %v", msg.Request, err)
	}
}

// ack sends a message and wants to hear that it was carried out.
func (m *machine) ack(msg *vhostwire.Message, fds ...int) {
	m.t.Helper()
	if code, err := m.try(msg, fds...); code != 0 || err != nil {
		m.t.Fatalf("message %d: code %d, %v", msg.Request, code, err)
	}
}

// try sends a message and wants an answer.
func (m *machine) try(msg *vhostwire.Message, fds ...int) (uint64, error) {
	m.t.Helper()
	flags := uint32(vhostwire.FlagNeedReply)
	if msg.Request == vhostwire.SetOwner { // before the feature is there
		m.send(msg, flags, fds...)
		return 0, nil
	}
	m.send(msg, flags, fds...)
	b, err := m.reply(msg.Request)
	if err != nil || len(b) != 8 {
		return 0, err
	}
	return binary.NativeEndian.Uint64(b), nil
}

// reply reads the payload of a reply.
func (m *machine) reply(r vhostwire.Request) ([]byte, error) {
	m.t.Helper()
	h := make([]byte, vhostwire.HeaderSize)
	if _, err := io.ReadFull(m.c, h); err != nil {
		return nil, err
	}
	if got, flags := binary.NativeEndian.Uint32(h), binary.NativeEndian.Uint32(h[4:]); got != uint32(r) ||
		flags != vhostwire.FlagReply|vhostwire.Version {
		return nil, fmt.Errorf("reply to %d, flags %#x", got, flags)
	}
	b := make([]byte, binary.NativeEndian.Uint32(h[8:]))
	_, err := io.ReadFull(m.c, b)
	return b, err
}

// number asks for a number.
func (m *machine) number(r vhostwire.Request) uint64 {
	m.t.Helper()
	m.send(&vhostwire.Message{Request: r}, 0)
	b, err := m.reply(r)
	if err != nil {
		m.t.Fatalf("message %d: %v", r, err)
	}
	return binary.NativeEndian.Uint64(b)
}

// config reads the whole configuration space.
func (m *machine) config() []byte {
	m.t.Helper()
	c := vhostwire.Config{Data: make([]byte, virtio.BlkConfigSize)}
	m.send(&vhostwire.Message{Request: vhostwire.GetConfig, Config: c}, 0)
	b, err := m.reply(vhostwire.GetConfig)
	if err != nil || len(b) != 12+virtio.BlkConfigSize {
		m.t.Fatalf("configuration of %d bytes, %v", len(b), err)
	}
	return b[12:]
}

// stop stops q and returns where it stands.
func (m *machine) stop(q *queue) uint32 {
	m.t.Helper()
	m.send(&vhostwire.Message{Request: vhostwire.GetVringBase, State: vhostwire.State{Index: q.index}}, 0)
	b, err := m.reply(vhostwire.GetVringBase)
	if err != nil || len(b) != 8 || binary.NativeEndian.Uint32(b) != q.index {
		m.t.Fatalf("GET_VRING_BASE: %x, %v", b, err)
	}
	return binary.NativeEndian.Uint32(b[4:])
}

// dropped waits for the end of the connection.
func (m *machine) dropped() {
	m.t.Helper()
	// With messages that nobody has read the end is a reset.
	if n, err := m.c.Read(make([]byte, 1)); err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
		m.t.Fatalf("%d bytes, %v instead of the end of the connection", n, err)
	}
}

// Types of requests.
const (
	reqIn, reqOut, reqFlush, reqGetID, reqDiscard, reqZero = 0, 1, 4, 8, 11, 13
)

// put makes a request available and returns its slot. n is the length of its data.
func (q *queue) put(typ uint32, sector uint64, data []byte, n int) int {
	q.m.t.Helper()
	slot := q.slot % slots
	q.slot++
	head := q.head + uint64(16*slot)
	b := q.m.guest.At(head, 16)
	binary.LittleEndian.PutUint32(b, typ)
	binary.LittleEndian.PutUint64(b[8:], sector)
	bufs := []virtiotest.Buf{{Addr: head, Len: 16}}
	at := q.data + uint64(slot*slotData)
	copy(q.m.guest.At(at, n), data)
	// The data in two pieces.
	for _, p := range [][2]int{{0, n / 2}, {n / 2, n}} {
		if p[1] > p[0] {
			bufs = append(bufs, virtiotest.Buf{
				Addr: at + uint64(p[0]), Len: uint32(p[1] - p[0]), Write: typ == reqIn || typ == reqGetID})
		}
	}
	stat := q.stat + uint64(slot)
	q.m.guest.At(stat, 1)[0] = 0xff
	bufs = append(bufs, virtiotest.Buf{Addr: stat, Len: 1, Write: true})
	kick, ok := q.d.Add(slot, bufs, q.m.features&virtio.FIndirect != 0)
	if !ok {
		q.m.t.Fatal("the queue is full")
	}
	if kick {
		signal(q.kick)
	}
	return slot
}

// used waits for the next request that is done, and returns its slot and status.
func (q *queue) used() (slot int, status byte) {
	q.m.t.Helper()
	for end := time.Now().Add(patience); ; {
		if token, _, ok := q.d.Used(); ok {
			return token.(int), q.m.guest.At(q.stat+uint64(token.(int)), 1)[0]
		}
		if q.d.Interrupts(true) {
			continue
		}
		left := time.Until(end)
		if left <= 0 {
			q.m.t.Fatal("no request is done")
		}
		p := []unix.PollFd{{Fd: int32(q.call), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, int(left.Milliseconds())+1); n > 0 {
			var b [8]byte
			unix.Read(q.call, b[:])
		}
	}
}

// bytes are the data of a slot.
func (q *queue) bytes(slot, n int) []byte {
	return q.m.guest.At(q.data+uint64(slot*slotData), n)
}

// do performs a request.
func (q *queue) do(typ uint32, sector uint64, data []byte, n int) (status byte, got []byte) {
	q.m.t.Helper()
	slot := q.put(typ, sector, data, n)
	done, status := q.used()
	if done != slot {
		q.m.t.Fatalf("request %d is done instead of %d", done, slot)
	}
	return status, q.bytes(slot, n)
}

// write writes, and reads what is there then by another queue.
func (m *machine) check(sector uint64, fill byte) {
	m.t.Helper()
	want := bytes.Repeat([]byte{fill}, 8192)
	if s, _ := m.queues[0].do(reqOut, sector, want, len(want)); s != 0 {
		m.t.Fatalf("write at sector %d: status %d", sector, s)
	}
	s, got := m.queues[len(m.queues)-1].do(reqIn, sector, make([]byte, len(want)), len(want))
	if s != 0 || !bytes.Equal(got, want) {
		m.t.Fatalf("read at sector %d: status %d, %x...", sector, s, got[:8])
	}
}

// segment is that of a discard or a write of zeroes.
func segment(sector uint64, sectors, flags uint32) []byte {
	b := binary.LittleEndian.AppendUint64(nil, sector)
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, sectors), flags)
}

// setCache has the guest switch the disk's cache on (1) or off.
func (m *machine) setCache(on byte) {
	m.t.Helper()
	m.ack(&vhostwire.Message{Request: vhostwire.SetConfig, Config: vhostwire.Config{
		Offset: virtio.BlkConfigWCE, Data: []byte{on}}})
}
