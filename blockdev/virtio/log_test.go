package virtio_test

import (
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// newLog is a log of n bytes, and its bytes.
func newLog(t *testing.T, n int) (*virtio.Log, []byte) {
	b := make([]byte, n)
	m := virtio.NewMapping(b, func([]byte) {})
	l, err := virtio.NewLog(m)
	if err != nil {
		t.Fatal(err)
	}
	m.Release()
	t.Cleanup(l.Release)
	return l, b
}

// pages lists the pages that are set, and clears them.
func pages(b []byte) (set []int) {
	for i := range 8 * len(b) {
		if b[i/8]&(1<<(i%8)) != 0 {
			set = append(set, i)
		}
	}
	clear(b)
	return set
}

func span(from, to int) (s []int) {
	for i := from; i <= to; i++ {
		s = append(s, i)
	}
	return s
}

func TestLogMark(t *testing.T) {
	l, b := newLog(t, 16)
	for _, c := range []struct {
		at, n uint64
		want  []int
	}{
		{0, 0, nil},
		{0, 1, span(0, 0)},
		{4095, 1, span(0, 0)},
		{4095, 2, span(0, 1)},
		{31 * 4096, 4097, span(31, 32)},
		{4096, 100 * 4096, span(1, 100)},
		{0, 128 * 4096, span(0, 127)},
		{127*4096 + 4095, 1, span(127, 127)},
	} {
		if err := l.Mark(c.at, c.n); err != nil {
			t.Error(err)
		}
		if got := pages(b); !slices.Equal(got, c.want) {
			t.Errorf("%d bytes at %d: %v, want %v", c.n, c.at, got, c.want)
		}
	}
	for _, c := range [][2]uint64{
		{128 * 4096, 1}, {128*4096 - 1, 2}, {math.MaxUint64, 1}, {math.MaxUint64, 2}, {1, math.MaxUint64},
	} {
		if err := l.Mark(c[0], c[1]); err == nil || pages(b) != nil {
			t.Errorf("%d bytes at %d: %v", c[1], c[0], err)
		}
	}
}

// TestLog: each page of the guest that a device changes is in the log, by comparison of all memory
// before and after each step; and of pages that it does not write only those of a buffer are.
func TestLog(t *testing.T) {
	for _, v := range variants {
		if v.indirect {
			continue
		}
		g := virtiotest.NewGuest(t, 1<<17)
		g.Base = 0
		g.Alloc(4096, 1)
		d := virtiotest.NewDriver(g, 512, v.features) // rings of several pages
		k := &disk{g: g, d: d, q: newQueue(t, d, 3)}
		g.Alloc(4096, 4096)
		l, b := newLog(t, 64)
		k.q.SetLog(l, true, d.Dev)
		r := &virtio.Request{}
		before := slices.Clone(g.Mem)
		check := func(step string, allowed ...int) {
			t.Helper()
			got := pages(b)
			for p := range len(before) / 4096 {
				page := func(b []byte) string { return string(b[4096*p : 4096*(p+1)]) }
				logged, changed := slices.Contains(got, p), page(before) != page(g.Mem)
				if changed && !logged || logged && !changed && !slices.Contains(allowed, p) {
					t.Errorf("%s: %s: page %d: logged %v, changed %v", v.name, step, p, logged, changed)
				}
			}
			copy(before, g.Mem)
		}
		for i := range 600 { // more than once around the ring
			if _, err := k.q.EnableKicks(); err != nil {
				t.Fatal(err)
			}
			check("kicks", int(d.Dev)/4096, int(d.Dev+4+8*512)/4096)
			n := 0
			if i%20 == 0 {
				n = 512
			}
			k.send(t, header(0, 8), n+1, 0, false)
			copy(before, g.Mem)
			if ok, err := r.Pop(k.q, limits); !ok || err != nil {
				t.Fatal(ok, err)
			}
			r.Data.CopyIn(data)
			in := int(k.in[0].Addr)
			if err := r.Finish(k.q, virtio.StatusOK); err != nil {
				t.Fatal(err)
			}
			check("finish", span(in/4096, (in+n)/4096)...)
			if _, err := k.q.Publish(); err != nil {
				t.Fatal(err)
			}
			check("publish", int(d.Dev)/4096)
			d.Used()
			copy(before, g.Mem)
		}
	}
}

// TestLogOff: rings are not logged unless that is wanted, and nothing is without a log.
func TestLogOff(t *testing.T) {
	k := newDisk(t, 0)
	l, b := newLog(t, 1<<16)
	for _, log := range []*virtio.Log{l, nil} {
		k.q.SetLog(log, false, 0)
		k.send(t, header(4, 0), 1, 0, false)
		r := &virtio.Request{}
		if ok, err := r.Pop(k.q, limits); !ok || err != nil {
			t.Fatal(ok, err)
		}
		k.answer(t, r, virtio.StatusOK)
		if _, err := k.q.EnableKicks(); err != nil {
			t.Fatal(err)
		}
		var want []int
		if log != nil {
			want = []int{int(k.in[0].Addr) / 4096}
		}
		if got := pages(b); !slices.Equal(got, want) {
			t.Errorf("logged %v, want %v", got, want)
		}
	}
}

// TestLogTooSmall: a page that cannot be logged would be lost by a migration.
func TestLogTooSmall(t *testing.T) {
	k := newDisk(t, 0)
	l, _ := newLog(t, 4)
	k.q.SetLog(l, false, 0)
	k.send(t, header(4, 0), 1, 0, false)
	r := &virtio.Request{}
	if ok, err := r.Pop(k.q, limits); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := r.Finish(k.q, virtio.StatusOK); err == nil || k.q.Err() == nil || k.q.InFlight() != 0 {
		t.Errorf("%v, %d in flight", err, k.q.InFlight())
	}
}

// TestLogGone: the log is memory of others, too.
func TestLogGone(t *testing.T) {
	k := newDisk(t, 0)
	other := virtiotest.NewGuest(t, 1<<17)
	m := virtio.NewMapping(other.Mem, func([]byte) {})
	l, err := virtio.NewLog(m)
	if err != nil {
		t.Fatal(err)
	}
	k.q.SetLog(l, false, 0)
	k.send(t, header(4, 0), 1, 0, false)
	r := &virtio.Request{}
	if ok, err := r.Pop(k.q, limits); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := unix.Ftruncate(other.FD, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Finish(k.q, virtio.StatusOK); err == nil {
		t.Error("the log is gone, and nobody noticed")
	}
}
