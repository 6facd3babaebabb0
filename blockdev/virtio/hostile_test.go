package virtio_test

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// raw is a queue whose ring a test writes itself.
type raw struct {
	*virtiotest.Driver
	packed bool
}

func newRaw(t *testing.T, features uint64) raw {
	return raw{virtiotest.NewDriver(virtiotest.NewGuest(t, 1<<20), 8, features), features&virtio.FPacked != 0}
}

// desc writes descriptor i of a table. next is the id in packed ones, whose flags say that they are
// available in the first round.
func (r raw) desc(table uint64, i int, addr uint64, n uint32, flags, next uint16) {
	b := r.G.At(table+uint64(16*i), 16)
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
	if r.packed {
		flags, next = next, flags|1<<7
	}
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// avail makes heads available.
func (r raw) avail(heads ...uint16) {
	if r.packed {
		return
	}
	for i, h := range heads {
		r.G.Store16(r.Drv+4+2*uint64(i), h)
	}
	r.G.Store16(r.Drv+2, uint16(len(heads)))
}

const (
	next, write, indirect = 1, 2, 4
	splitFeatures         = virtio.FVersion1 | virtio.FIndirect
	packedFeatures        = splitFeatures | virtio.FPacked
)

// ring is a raw one with memory for data, and for a table.
type ring struct {
	raw
	data, table uint64
}

var (
	both       = []uint64{splitFeatures, packedFeatures}
	splitOnly  = both[:1]
	packedOnly = both[1:]
)

var hostile = []struct {
	name     string
	features []uint64
	make     func(r ring)
	want     string
}{
	{"loop", splitOnly, func(r ring) {
		r.desc(r.Desc, 0, r.data, 1, next, 1)
		r.desc(r.Desc, 1, r.data, 1, next, 0)
	}, "longer than 8 descriptors, or a loop"},
	{"self", splitOnly, func(r ring) { r.desc(r.Desc, 0, r.data, 1, next, 0) }, "loop"},
	{"head", splitOnly, func(r ring) { r.avail(8) }, "head 8 in a queue of 8"},
	{"next", splitOnly, func(r ring) { r.desc(r.Desc, 0, r.data, 1, next, 8) }, "descriptor 8 of a table of 8"},
	{"index", splitOnly, func(r ring) { r.G.Store16(r.Drv+2, 9) }, "went from 0 to 9"},
	{"index back", splitOnly, func(r ring) { r.G.Store16(r.Drv+2, 0xffff) }, "went from 0 to 65535"},
	{"all next", packedOnly, func(r ring) {
		for i := range 8 {
			r.desc(r.Desc, i, r.data, 1, next, 0)
		}
	}, "longer than the 8 descriptors"},
	{"empty", both, func(r ring) { r.desc(r.Desc, 0, r.data, 0, 0, 0) }, "is empty"},
	{"nowhere", both, func(r ring) { r.desc(r.Desc, 0, 1<<60, 1, 0, 0) }, "in no memory region"},
	{"before", both, func(r ring) { r.desc(r.Desc, 0, r.G.Base-1, 2, 0, 0) }, "in no memory region"},
	{"behind", both, func(r ring) { r.desc(r.Desc, 0, r.G.Base+1<<20-1, 2, 0, 0) }, "in no memory region"},
	{"huge", both, func(r ring) { r.desc(r.Desc, 0, r.G.Base, math.MaxUint32, 0, 0) }, "in no memory region"},
	{"overflow", both, func(r ring) { r.desc(r.Desc, 0, math.MaxUint64, 2, 0, 0) }, "overflows"},
	{"order", both, func(r ring) {
		r.desc(r.Desc, 0, r.data, 1, next|write, 1)
		r.desc(r.Desc, 1, r.data, 1, 0, 0)
	}, "follows one for writing"},
	{"indirect in indirect", splitOnly, func(r ring) {
		r.desc(r.Desc, 0, r.table, 16, indirect, 0)
		r.desc(r.table, 0, r.table, 16, indirect, 0)
	}, "an indirect table has an indirect descriptor"},
	{"indirect loop", splitOnly, func(r ring) {
		r.desc(r.Desc, 0, r.table, 16, indirect, 0)
		r.desc(r.table, 0, r.data, 1, next, 0)
	}, "loop"},
	{"indirect next", splitOnly, func(r ring) {
		r.desc(r.Desc, 0, r.table, 16, indirect, 0)
		r.desc(r.table, 0, r.data, 1, next, 1)
	}, "descriptor 1 of a table of 1"},
	{"indirect and next", both, func(r ring) { r.desc(r.Desc, 0, r.table, 16, indirect|next, 0) }, "has a next one"},
	{"indirect size", both, func(r ring) { r.desc(r.Desc, 0, r.table, 17, indirect, 0) }, "has 17 bytes"},
	{"indirect empty", both, func(r ring) { r.desc(r.Desc, 0, r.table, 0, indirect, 0) }, "has 0 bytes"},
	{"indirect huge", both, func(r ring) { r.desc(r.Desc, 0, r.table, 1<<20+16, indirect, 0) }, "has 1048592 bytes"},
	{"indirect nowhere", both, func(r ring) { r.desc(r.Desc, 0, 1<<60, 16, indirect, 0) }, "in no memory region"},
	{"indirect overflow", both, func(r ring) { r.desc(r.Desc, 0, math.MaxUint64-15, 16, indirect, 0) }, "overflows"},
	{"indirect long", packedOnly, func(r ring) { r.desc(r.Desc, 0, r.table, 1025*16, indirect, 0) }, "1025 descriptors"},
	{"indirect in a chain", packedOnly, func(r ring) {
		r.desc(r.Desc, 0, r.data, 1, next, 0)
		r.desc(r.Desc, 1, r.table, 16, indirect, 0)
	}, "a chain has an indirect descriptor"},
	{"not negotiated", []uint64{0, virtio.FPacked}, func(r ring) {
		r.desc(r.Desc, 0, r.table, 16, indirect, 0)
	}, "not negotiated"},
}

// TestHostile: rings that make no sense break the queue, for good, with an error that says why.
func TestHostile(t *testing.T) {
	for _, c := range hostile {
		for _, features := range c.features {
			d := newRaw(t, features)
			r := ring{d, d.G.Alloc(64, 1), d.G.Alloc(2<<14, 16)}
			d.avail(0)
			c.make(r)
			q := newTracked(t, d.Driver, 5, newArea(d.Driver))
			expectBroken(t, c.name, q, c.want)
		}
	}
}

// expectBroken has q break in the next Pop, with these words, and stay so.
func expectBroken(t *testing.T, name string, q *virtio.Queue, want string) {
	t.Helper()
	var c virtio.Chain
	if ok, err := q.Pop(&c); ok || err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v, %v, want %q", name, ok, err, want)
	}
	if _, err := q.EnableKicks(); err == nil || !strings.Contains(err.Error(), want) || q.Err() == nil {
		t.Errorf("%s: the queue works on: %v", name, err)
	}
}

// TestTwice: a buffer is made available again while the device has it.
func TestTwice(t *testing.T) {
	d := newRaw(t, splitFeatures)
	d.desc(d.Desc, 0, d.G.Alloc(1, 1), 1, 0, 0)
	d.avail(0, 0)
	q := newQueue(t, d.Driver, 1)
	if ok, err := q.Pop(&virtio.Chain{}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	expectBroken(t, "twice", q, "while the device has it")

	d = newRaw(t, packedFeatures)
	for i := range 8 {
		d.desc(d.Desc, i, d.G.Alloc(1, 1), 1, 0, 3)
	}
	q = newQueue(t, d.Driver, 1)
	for range 8 {
		if ok, err := q.Pop(&virtio.Chain{}); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	for i := range 8 {
		d.desc(d.Desc, i, d.G.Alloc(1, 1), 1, 1<<15, 3)
		d.G.At(d.Desc+uint64(16*i)+14, 1)[0] = 0
	}
	if ok, err := q.Pop(&virtio.Chain{}); ok || err != nil {
		t.Errorf("%v, %v: more buffers than descriptors", ok, err)
	}
}

// TestDirectThenIndirect: in split queues a table may follow other descriptors.
func TestDirectThenIndirect(t *testing.T) {
	d := newRaw(t, splitFeatures)
	at, table := d.G.Alloc(4, 1), d.G.Alloc(32, 16)
	d.desc(d.Desc, 0, at, 1, next, 1)
	d.desc(d.Desc, 1, table, 32, indirect, 0)
	d.desc(table, 0, at+1, 1, next, 1)
	d.desc(table, 1, at+2, 2, write, 0)
	d.avail(0)
	var c virtio.Chain
	if ok, err := newQueue(t, d.Driver, 1).Pop(&c); !ok || err != nil || c.OutLen() != 2 || c.InLen() != 2 {
		t.Errorf("%v, %v, %d, %d", ok, err, c.OutLen(), c.InLen())
	}
}

func TestNewQueueRefuses(t *testing.T) {
	g := virtiotest.NewGuest(t, 1<<20)
	mem := g.Memory(t, 2)
	good := virtio.QueueConfig{
		Size: 8, Memory: mem, Features: virtio.FEventIdx,
		Rings: virtio.Rings{Desc: g.User, Driver: g.User + 4096, Device: g.User + 8192},
	}
	for _, c := range []struct {
		name   string
		change func(c *virtio.QueueConfig)
		want   string
	}{
		{"", func(c *virtio.QueueConfig) {}, ""},
		{"size 0", func(c *virtio.QueueConfig) { c.Size = 0 }, "cannot have 0"},
		{"size 9", func(c *virtio.QueueConfig) { c.Size = 9 }, "cannot have 9"},
		{"size 9, packed", func(c *virtio.QueueConfig) { c.Size = 9; c.Features |= virtio.FPacked }, ""},
		{"large", func(c *virtio.QueueConfig) { c.Size = 1 << 16 }, "cannot have 65536"},
		{"desc", func(c *virtio.QueueConfig) { c.Rings.Desc += 8 }, "not aligned to 16"},
		{"driver", func(c *virtio.QueueConfig) { c.Rings.Driver++ }, "not aligned to 2"},
		{"device", func(c *virtio.QueueConfig) { c.Rings.Device += 2 }, "not aligned to 4"},
		{"nowhere", func(c *virtio.QueueConfig) { c.Rings.Desc = 16 }, "not in one memory region"},
		{"two regions", func(c *virtio.QueueConfig) { c.Rings.Desc = g.User + 1<<19 - 64 }, "not in one memory region"},
		{"end", func(c *virtio.QueueConfig) { c.Rings.Device = g.User + 1<<20 - 68 }, "not in one memory region"},
		{"overflow", func(c *virtio.QueueConfig) { c.Rings.Device = math.MaxUint64 - 3 }, "not in one memory region"},
		{"base, packed", func(c *virtio.QueueConfig) { c.Base = 8; c.Features |= virtio.FPacked }, "cannot begin at 8"},
		{"area", func(c *virtio.QueueConfig) { c.Inflight = make([]byte, 143) }, "has 143 bytes for a queue, needed are 192"},
		{"area unaligned", func(c *virtio.QueueConfig) { c.Inflight = g.Mem[1:1000] }, "not aligned to 8"},
	} {
		cfg := good
		c.change(&cfg)
		q, err := virtio.NewQueue(cfg)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if err == nil {
			q.Close()
		}
	}
}
