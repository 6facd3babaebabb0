package virtio_test

import (
	"testing"
	"time"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// refill is a queue with the same reads in it again and again.
type refill struct {
	*disk
	n    int
	bufs []virtiotest.Buf
}

func newRefill(t testing.TB, features uint64, indirect bool, n int, area bool) *refill {
	g := virtiotest.NewGuest(t, 1<<20)
	d := virtiotest.NewDriver(g, 256, features)
	k := &refill{disk: &disk{g: g, d: d}, n: n}
	var b []byte
	if area {
		b = newArea(d)
	}
	k.q = newTracked(t, d, 3, b)
	head, page, status := g.Alloc(16, 1), g.Alloc(4096, 4096), g.Alloc(1, 1)
	copy(g.At(head, 16), header(0, 8))
	k.bufs = []virtiotest.Buf{
		{Addr: head, Len: 16}, {Addr: page, Len: 4096, Write: true}, {Addr: status, Len: 1, Write: true},
	}
	k.again(t, indirect)
	return k
}

// again makes the n requests available again after all were used.
func (k *refill) again(t testing.TB, indirect bool) {
	for {
		if _, _, ok := k.d.Used(); !ok {
			break
		}
	}
	for range k.n {
		if _, ok := k.d.Add("", k.bufs, indirect); !ok {
			t.Fatal("no room")
		}
	}
}

// serveAll pops all requests, finishes and publishes them.
func (k *refill) serveAll(t testing.TB, rs []virtio.Request) {
	for i := range rs {
		if ok, err := rs[i].Pop(k.q, limits); !ok || err != nil || rs[i].Op != virtio.OpRead {
			t.Fatal(ok, err, rs[i].Op)
		}
	}
	for i := range rs {
		if err := rs[i].Finish(k.q, virtio.StatusOK); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.q.Publish(); err != nil {
		t.Fatal(err)
	}
}

// TestNoAllocations: a request costs none once its slices are there.
func TestNoAllocations(t *testing.T) {
	for _, v := range variants {
		for _, area := range []bool{false, true} {
			k := newRefill(t, v.features, v.indirect, 24, area)
			rs := make([]virtio.Request, 8)
			k.serveAll(t, rs)
			// The driver allocates: measured is the device alone, once after a call that is not.
			n := testing.AllocsPerRun(1, func() {
				k.serveAll(t, rs)
				if _, err := k.q.EnableKicks(); err != nil {
					t.Fatal(err)
				}
			})
			if n != 0 {
				t.Errorf("%s, area %v: %v allocations for 8 requests", v.name, area, n)
			}
		}
	}
}

// BenchmarkPopFinish measures the device's work for reads of 4 KiB in batches of 64, without their
// data: ns/request is that of the best batch. ns/op has the driver's work in it.
func BenchmarkPopFinish(b *testing.B) {
	for _, v := range variants {
		for _, area := range []bool{false, true} {
			name := v.name
			if area {
				name += "-inflight"
			}
			b.Run(name, func(b *testing.B) {
				const batch = 64
				k := newRefill(b, v.features, v.indirect, batch, area)
				rs := make([]virtio.Request, batch)
				best := time.Hour
				for n := 0; n < b.N; n += batch {
					from := time.Now()
					k.serveAll(b, rs)
					best = min(best, time.Since(from))
					k.again(b, v.indirect)
				}
				b.ReportMetric(float64(best.Nanoseconds())/batch, "ns/request")
			})
		}
	}
}
