package virtio_test

import (
	"errors"
	"math"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// TestMemoryLife: a mapping lives as long as a table, a queue or a buffer needs it.
func TestMemoryLife(t *testing.T) {
	g := virtiotest.NewGuest(t, 1<<20)
	d := virtiotest.NewDriver(g, 4, 0)
	unmapped := 0
	m := virtio.NewMapping(virtiotest.Map(t, g.FD, len(g.Mem)), func([]byte) { unmapped++ })
	mem, err := virtio.NewMemory(g.Regions(m, 2))
	if err != nil {
		t.Fatal(err)
	}
	m.Release()
	q, err := virtio.NewQueue(virtio.QueueConfig{Size: 4, Memory: mem, Rings: d.Rings()})
	if err != nil {
		t.Fatal(err)
	}
	d.Add("", []virtiotest.Buf{{Addr: g.Alloc(1, 1), Len: 1}}, false)
	d.Add("", []virtiotest.Buf{{Addr: g.Alloc(1, 1), Len: 1}}, false)
	var c, c2 virtio.Chain
	if ok, err := q.Pop(&c); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if ok, err := q.Pop(&c2); !ok || err != nil {
		t.Fatal(ok, err)
	}
	other := g.Memory(t, 1)
	if err := q.SetMemory(other); err != nil {
		t.Fatal(err)
	}
	mem.Release()
	if err := q.Put(&c, 0); err != nil {
		t.Fatal(err)
	}
	if unmapped != 0 {
		t.Fatal("unmapped while a buffer is in flight")
	}
	q.Close()
	q.Drop(&c2)
	if unmapped != 1 {
		t.Errorf("unmapped %d times", unmapped)
	}
}

func TestMemoryTables(t *testing.T) {
	g := virtiotest.NewGuest(t, 1<<20)
	m := virtio.NewMapping(virtiotest.Map(t, g.FD, len(g.Mem)), func([]byte) {})
	region := func(guest, user, size, off uint64) virtio.Region {
		return virtio.Region{Guest: guest, User: user, Size: size, Offset: off, Mapping: m}
	}
	a := region(0x1000, 0x5000, 0x1000, 0)
	mem, err := virtio.NewMemory([]virtio.Region{a})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		r    virtio.Region
		want string
	}{
		{region(0x2000, 0x6000, 0x1000, 0), ""},
		{region(0, 0x4000, 0x1000, 0), ""},
		{region(math.MaxUint64&^0xfff-0x1000, 0x9000, 0x1000, 0), ""},
		{region(0x1ff0, 0x8000, 0x1000, 0), "overlap"},
		{region(0x0ff0, 0x8000, 0x20, 0), "overlap"},
		{region(0x8000, 0x4ff0, 0x1000, 0), "overlap"},
		{region(0x1000, 0x5000, 0x1000, 0), "overlap"},
		{region(math.MaxUint64&^0xfff, 0x9000, 0x1000, 0), "too many"},
		{region(0x9000, math.MaxUint64&^0xfff, 0x2000, 0), "too many"},
		{region(0x9000, 0x9000, math.MaxUint64&^0xf, 0), "too many"},
		{region(0x9000, 0x9000, 0, 0), "empty"},
		{region(0x9000, 0x9000, 1<<20+16, 0), "not in its mapping"},
		{region(0x9000, 0x9000, 16, 1<<20), "not in its mapping"},
		{region(0x9000, 0x9000, 16, math.MaxUint64&^0xf), "not in its mapping"},
		{region(0x9001, 0x9000, 16, 0), "aligned"},
		{region(0x9000, 0x9008, 16, 0), "aligned"},
		{region(0x9000, 0x9000, 8, 0), "aligned"},
	} {
		more, err := mem.With(c.r)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v, want %q", c.r, err, c.want)
		}
		if err != nil {
			continue
		}
		if less, err := more.Without(a.Guest, a.User, a.Size); err != nil || less.Regions() != 1 {
			t.Error(err)
		}
		if _, err := more.Without(a.Guest, a.User, a.Size-16); err == nil {
			t.Error("a region of another size is removed")
		}
	}
}

// TestGuard: what is not a fault passes, what is one becomes an error and lets deferred functions
// run.
func TestGuard(t *testing.T) {
	g := virtiotest.NewGuest(t, 8192)
	if err := unix.Ftruncate(g.FD, 4096); err != nil {
		t.Fatal(err)
	}
	ran := false
	err := virtio.Guard(func() error {
		defer func() { ran = true }()
		g.Mem[4096] = 1
		return nil
	})
	if !errors.Is(err, virtio.ErrFault) || !ran {
		t.Errorf("%v, %v", err, ran)
	}
	// The kernel, asked to read into what has gone, says so.
	null, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	if n, err := unix.Read(null, g.Mem[4096:]); !errors.Is(err, unix.EFAULT) {
		t.Errorf("%d, %v", n, err)
	}
	if err := virtio.Guard(func() error { return unix.EIO }); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("nil was dereferenced, and nobody noticed")
			}
		}()
		var p *int
		_ = virtio.Guard(func() error { *p = 1; return nil })
	}()
	if n := testing.AllocsPerRun(100, func() { _ = virtio.Guard(func() error { g.Mem[0]++; return nil }) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestTruncated: the guest's memory goes away under a queue, at every step of its work.
func TestTruncated(t *testing.T) {
	for _, v := range variants {
		steps := []func(q *virtio.Queue, r *virtio.Request) error{
			func(q *virtio.Queue, r *virtio.Request) error { _, err := r.Pop(q, limits); return err },
			func(q *virtio.Queue, r *virtio.Request) error { return r.SetID("x") },
			func(q *virtio.Queue, r *virtio.Request) error { return r.Finish(q, virtio.StatusOK) },
			func(q *virtio.Queue, r *virtio.Request) error { _, err := q.Publish(); return err },
			func(q *virtio.Queue, r *virtio.Request) error { _, err := q.EnableKicks(); return err },
		}
		for gone := range steps {
			k := newDisk(t, v.features)
			k.send(t, header(8, 0), 21, 0, v.indirect)
			r := &virtio.Request{}
			for i, step := range steps {
				if i == gone {
					if err := unix.Ftruncate(k.g.FD, 0); err != nil {
						t.Fatal(err)
					}
				}
				err := step(k.q, r)
				if i < gone && err != nil || i == gone && !errors.Is(err, virtio.ErrFault) {
					t.Fatalf("%s: gone at %d: step %d: %v", v.name, gone, i, err)
				}
				if i == gone {
					break
				}
			}
			if _, err := r.Pop(k.q, limits); gone != 1 && !errors.Is(err, virtio.ErrFault) {
				t.Errorf("%s: gone at %d: the queue works on: %v", v.name, gone, err)
			}
		}
	}
}
