package virtio_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"reflect"
	"strings"
	"testing"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

var limits = &virtio.BlkLimits{
	BlockSize: 4096, MaxDiscardSectors: 1000, MaxDiscardSegments: 2, MaxZeroSectors: 2000, MaxZeroSegments: 1,
}

// header is the bytes of a request's header.
func header(typ uint32, sector uint64) []byte {
	b := binary.LittleEndian.AppendUint32(nil, typ)
	b = binary.LittleEndian.AppendUint32(b, 0)
	return binary.LittleEndian.AppendUint64(b, sector)
}

func segment(sector uint64, sectors, flags uint32) []byte {
	b := binary.LittleEndian.AppendUint64(nil, sector)
	b = binary.LittleEndian.AppendUint32(b, sectors)
	return binary.LittleEndian.AppendUint32(b, flags)
}

// disk is one queue with a request in it.
type disk struct {
	g  *virtiotest.Guest
	d  *virtiotest.Driver
	q  *virtio.Queue
	in []virtiotest.Buf
}

func newDisk(t testing.TB, features uint64) *disk {
	g := virtiotest.NewGuest(t, 1<<20)
	d := virtiotest.NewDriver(g, 256, features)
	return &disk{g: g, d: d, q: newQueue(t, d, 3)}
}

// send makes a request available: out in pieces of cut bytes, 0: in one, and in bytes to write,
// cut alike.
func (k *disk) send(t testing.TB, out []byte, in, cut int, indirect bool) {
	t.Helper()
	k.in = nil
	pieces := func(n int, write bool) (bufs []virtiotest.Buf) {
		at := k.g.Alloc(max(n, 1), 1)
		for off := 0; off < n; off += cut {
			bufs = append(bufs, virtiotest.Buf{Addr: at + uint64(off), Len: uint32(min(cut, n-off)), Write: write})
		}
		return bufs
	}
	if cut == 0 {
		cut = math.MaxInt32
	}
	outs := pieces(len(out), false)
	if len(out) > 0 {
		copy(k.g.At(outs[0].Addr, len(out)), out)
	}
	k.in = pieces(in, true)
	for i := range in {
		k.g.At(k.in[0].Addr, in)[i] = 0xee
	}
	if _, ok := k.d.Add("", append(outs, k.in...), indirect); !ok {
		t.Fatal("no room")
	}
}

// answer finishes r, and returns what the driver sees of it.
func (k *disk) answer(t testing.TB, r *virtio.Request, s virtio.Status) (written uint32, in []byte) {
	t.Helper()
	if err := r.Finish(k.q, s); err != nil {
		t.Fatal(err)
	}
	if _, err := k.q.Publish(); err != nil {
		t.Fatal(err)
	}
	_, written, ok := k.d.Used()
	if !ok {
		t.Fatal("nothing used")
	}
	for _, b := range k.in {
		in = append(in, k.g.At(b.Addr, int(b.Len))...)
	}
	return written, in
}

// asked is what a device makes of a request.
type asked struct {
	op       virtio.Op
	off, n   int64
	segments []virtio.Segment
	status   virtio.Status // of what is refused
	written  uint32
}

var data = bytes.Repeat([]byte("qblockd!"), 128)

var requests = []struct {
	name string
	out  []byte
	in   int
	want asked
}{
	{"read", header(0, 8), 1024 + 1, asked{op: virtio.OpRead, off: 4096, n: 1024, written: 1025}},
	{"read nothing", header(0, 8), 1, asked{op: virtio.OpRead, off: 4096, written: 1}},
	{"read, barrier", header(1<<31, 8), 513, asked{op: virtio.OpRead, off: 4096, n: 512, written: 513}},
	{"write", append(header(1, 16), data...), 1, asked{op: virtio.OpWrite, off: 8192, n: 1024, written: 1}},
	{"flush", header(4, 0), 1, asked{op: virtio.OpFlush, written: 1}},
	{"last sector", header(0, (math.MaxInt64-4096)/512&^7), 1 + 512, asked{
		op: virtio.OpRead, off: (math.MaxInt64 - 4096) &^ 4095, n: 512, written: 513}},
	{"discard", append(header(11, 0), append(segment(8, 8, 0), segment(80, 1000, 0)...)...), 1, asked{
		op: virtio.OpDiscard, written: 1,
		segments: []virtio.Segment{{Off: 4096, N: 4096}, {Off: 40960, N: 512000}}}},
	{"zeroes", append(header(13, 0), segment(8, 2000, 0)...), 1, asked{op: virtio.OpWriteZeroes, written: 1,
		segments: []virtio.Segment{{Off: 4096, N: 2000 * 512}}}},
	{"zeroes, unmap", append(header(13, 0), segment(8, 8, 1)...), 1, asked{op: virtio.OpWriteZeroes, written: 1,
		segments: []virtio.Segment{{Off: 4096, N: 4096, Unmap: true}}}},

	{"no header", nil, 513, asked{status: virtio.StatusIOErr}},
	{"half a header", header(0, 0)[:15], 1, asked{status: virtio.StatusIOErr, written: 1}},
	{"unaligned", header(0, 1), 513, asked{status: virtio.StatusIOErr}},
	{"half a sector", header(0, 8), 1 + 256, asked{status: virtio.StatusIOErr}},
	{"sector overflows", header(0, math.MaxUint64/512), 513, asked{status: virtio.StatusIOErr}},
	{"end overflows", append(header(13, 0), segment(math.MaxInt64/512-7, 8, 0)...), 1, asked{
		status: virtio.StatusIOErr, written: 1}},
	{"unknown", header(99, 0), 1, asked{status: virtio.StatusUnsupported, written: 1}},
	{"lifetime", header(10, 0), 7, asked{status: virtio.StatusUnsupported}},
	{"discard, nothing", header(11, 0), 1, asked{status: virtio.StatusIOErr, written: 1}},
	{"discard, half", append(header(11, 0), segment(8, 8, 0)[:8]...), 1, asked{status: virtio.StatusIOErr, written: 1}},
	{"discard, unmap", append(header(11, 0), segment(8, 8, 1)...), 1, asked{status: virtio.StatusUnsupported, written: 1}},
	{"discard, flag", append(header(11, 0), segment(8, 8, 2)...), 1, asked{status: virtio.StatusUnsupported, written: 1}},
	{"discard, too much", append(header(11, 0), segment(8, 1001, 0)...), 1, asked{status: virtio.StatusIOErr, written: 1}},
	{"zeroes, too many", append(header(13, 0), append(segment(8, 8, 0), segment(8, 8, 0)...)...), 1, asked{
		status: virtio.StatusUnsupported, written: 1}},
	{"zeroes, flag", append(header(13, 0), segment(8, 8, 3)...), 1, asked{status: virtio.StatusUnsupported, written: 1}},
	{"zeroes, too much", append(header(13, 0), segment(8, 2001, 0)...), 1, asked{status: virtio.StatusIOErr, written: 1}},
}

func TestRequests(t *testing.T) {
	for _, c := range requests {
		for _, v := range variants {
			for _, cut := range []int{0, 7, 16, 17, 500} {
				k := newDisk(t, v.features)
				k.send(t, c.out, c.in, cut, v.indirect)
				if got := k.serve(t, c.in-1); !reflect.DeepEqual(got, c.want) {
					t.Errorf("%s, %s, %d: %+v, want %+v", c.name, v.name, cut, got, c.want)
				}
			}
		}
	}
}

// serve has the one request served, and tells what it was. A read of n bytes is answered with data,
// and a write is expected to be of data.
func (k *disk) serve(t *testing.T, n int) asked {
	r := &virtio.Request{}
	if ok, err := r.Pop(k.q, limits); !ok || err != nil {
		t.Fatal(ok, err)
	}
	got := asked{op: r.Op, off: r.Off, n: r.N, status: r.Status}
	if r.Op != virtio.OpRefused {
		got.segments, got.status = append([]virtio.Segment(nil), r.Segments...), virtio.StatusOK
	}
	if r.Data.Len() != r.N {
		t.Errorf("%d bytes of data, want %d", r.Data.Len(), r.N)
	}
	switch r.Op {
	case virtio.OpRead:
		r.Data.CopyIn(data)
	case virtio.OpWrite:
		b := make([]byte, r.N)
		if r.Data.CopyOut(b); !bytes.Equal(b, data) {
			t.Errorf("wrong data")
		}
	}
	op, status := r.Op, got.status
	written, in := k.answer(t, r, status)
	got.written = written
	if s := virtio.Status(in[len(in)-1]); s != status {
		t.Errorf("the driver sees status %d, want %d", s, status)
	}
	if op == virtio.OpRead && !bytes.Equal(in[:n], data[:n]) {
		t.Errorf("the driver sees wrong data")
	}
	return got
}

func TestSetID(t *testing.T) {
	nuls := strings.Repeat("\x00", 14)
	for _, c := range []struct {
		room    int
		id      string
		want    string
		written uint32
	}{
		{20, "serial", "serial" + nuls, 21},
		{20, "more than twenty bytes", "more than twenty byt", 21},
		{4, "serial", "seri", 5},
		{22, "serial", "serial" + nuls + "\xee\xee", 20},
	} {
		k := newDisk(t, virtio.FIndirect)
		k.send(t, header(8, 0), c.room+1, 3, true)
		r := &virtio.Request{}
		if ok, err := r.Pop(k.q, limits); !ok || err != nil || r.Op != virtio.OpGetID {
			t.Fatal(ok, err, r.Op)
		}
		if err := r.SetID(c.id); err != nil {
			t.Fatal(err)
		}
		written, in := k.answer(t, r, virtio.StatusOK)
		if string(in) != c.want+"\x00" || written != c.written {
			t.Errorf("%q, %d, want %q, %d", in, written, c.want, c.written)
		}
	}
}

// TestFailedRead: the driver is not told that memory was written which was not.
func TestFailedRead(t *testing.T) {
	k := newDisk(t, 0)
	k.send(t, header(0, 0), 4097, 0, false)
	r := &virtio.Request{}
	if ok, err := r.Pop(k.q, limits); !ok || err != nil || r.Op != virtio.OpRead {
		t.Fatal(ok, err, r.Op)
	}
	if written, in := k.answer(t, r, virtio.StatusIOErr); written != 0 || in[4096] != 1 {
		t.Errorf("written %d, status %d", written, in[4096])
	}
}

func TestNoStatus(t *testing.T) {
	k := newDisk(t, 0)
	k.send(t, header(0, 0), 0, 0, false)
	r := &virtio.Request{}
	if ok, err := r.Pop(k.q, limits); ok || err == nil || k.q.Err() == nil || k.q.InFlight() != 0 {
		t.Errorf("%v, %v, %d in flight", ok, err, k.q.InFlight())
	}
}

func TestConfig(t *testing.T) {
	c := virtio.BlkConfig{
		Capacity: 0x0807060504030201, SizeMax: 0x0c0b0a09, SegMax: 0x100f0e0d,
		BlockSize: 0x18171615, PhysicalExp: 0x19, AlignmentOffset: 0x1a,
		MinIO: 0x1c1b, OptIO: 0x201f1e1d, WriteBack: true, Queues: 0x2423,
		MaxDiscardSectors: 0x28272625, MaxDiscardSegments: 0x2c2b2a29,
		DiscardAlign: 0x302f2e2d, MaxZeroSectors: 0x34333231, MaxZeroSegments: 0x38373635, ZeroMayUnmap: true,
	}
	b := c.Encode()
	for i, v := range b {
		want := byte(i + 1)
		switch {
		case i == virtio.BlkConfigWCE, i == 56:
			want = 1
		case i >= 16 && i < 20, i == 33, i > 56:
			want = 0
		}
		if v != want {
			t.Errorf("byte %d is %d, want %d", i, v, want)
		}
	}
}
