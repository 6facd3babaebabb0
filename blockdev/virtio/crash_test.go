//go:build invariants

package virtio_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// crashed is what a device panics with that ends before a store.
type crashed struct{}

// device is one life of a device: it ends at the n-th store.
type device struct {
	q    *virtio.Queue
	held []*virtio.Chain
	ids  []uint32 // of held
	// popped is all that this life has popped, in order.
	popped []uint32
}

// life has f use a device until it returns or has made n stores, and tells whether it returned.
func life(n int, f func()) (over bool) {
	virtio.SetStep(func() {
		if n--; n < 0 {
			panic(crashed{})
		}
	})
	defer func() {
		virtio.SetStep(nil)
		if r := recover(); r != nil {
			if _, ok := r.(crashed); !ok {
				panic(r)
			}
		}
	}()
	f()
	return true
}

func (v *device) pop(t *testing.T) bool {
	c := &virtio.Chain{}
	ok, err := v.q.Pop(c)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return false
	}
	var b []byte
	for _, o := range c.Out() {
		b = append(b, o...)
	}
	id := binary.LittleEndian.Uint32(b)
	v.held, v.ids, v.popped = append(v.held, c), append(v.ids, id), append(v.popped, id)
	return true
}

// publish finishes n of what the device has, in any order.
func (v *device) publish(t *testing.T, rnd *rand.Rand, n int) {
	rnd.Shuffle(len(v.held), func(i, j int) {
		v.held[i], v.held[j] = v.held[j], v.held[i]
		v.ids[i], v.ids[j] = v.ids[j], v.ids[i]
	})
	for i, c := range v.held[:n] {
		binary.LittleEndian.PutUint32(c.In()[0], v.ids[i])
		if err := v.q.Put(c, 4); err != nil {
			t.Fatal(err)
		}
	}
	v.held, v.ids = v.held[n:], v.ids[n:]
	if _, err := v.q.Publish(); err != nil {
		t.Fatal(err)
	}
}

// TestCrash ends devices at any store, several times in the life of a queue. What the next one pops
// is what the driver does not have back, in the order in which it was made available: so nothing is
// served that was published, nothing is lost, and the order is kept.
func TestCrash(t *testing.T) {
	for _, v := range variants {
		for _, size := range []int{2, 8, 32} {
			t.Run(fmt.Sprintf("%s/%d", v.name, size), func(t *testing.T) {
				for seed := range uint64(50) {
					testCrash(t, v.features, v.indirect, size, seed)
				}
			})
		}
	}
}

// guest is the driver's side of TestCrash.
type guest struct {
	d    *virtiotest.Driver
	rnd  *rand.Rand
	sent uint32
	out  []uint32 // sent and not back, in order
	at   map[uint32]uint64
	free []uint64
}

// send makes up to n more buffers available.
func (g *guest) send(n int, indirect bool) {
	for range n {
		if len(g.free) == 0 {
			return
		}
		at := g.free[0]
		binary.LittleEndian.PutUint32(g.d.G.At(at, 4), g.sent)
		bufs := []virtiotest.Buf{{Addr: at, Len: 4}, {Addr: at + 4, Len: 4, Write: true}}
		if g.d.Size > 4 && g.rnd.IntN(2) == 0 {
			bufs = []virtiotest.Buf{{Addr: at, Len: 1}, {Addr: at + 1, Len: 3}, {Addr: at + 4, Len: 4, Write: true}}
		}
		if _, ok := g.d.Add(g.sent, bufs, indirect); !ok {
			return
		}
		g.free, g.at[g.sent] = g.free[1:], at
		g.out = append(g.out, g.sent)
		g.sent++
	}
}

// collect takes all that is used.
func (g *guest) collect(t *testing.T) (n int) {
	for {
		token, _, ok := g.d.Used()
		if !ok {
			return n
		}
		id := token.(uint32)
		i := slices.Index(g.out, id)
		if i < 0 {
			t.Fatalf("buffer %d is used, out are %v", id, g.out)
		}
		if got := binary.LittleEndian.Uint32(g.d.G.At(g.at[id]+4, 4)); got != id {
			t.Fatalf("buffer %d is used, and says it is %d", id, got)
		}
		g.out = slices.Delete(g.out, i, i+1)
		g.free = append(g.free, g.at[id])
		n++
	}
}

func testCrash(t *testing.T, features uint64, indirect bool, size int, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, uint64(size)))
	g := virtiotest.NewGuest(t, 1<<20)
	d := virtiotest.NewDriver(g, size, features)
	drv := &guest{d: d, rnd: rnd, at: map[uint32]uint64{}}
	for range size {
		drv.free = append(drv.free, g.Alloc(8, 8))
	}
	area := g.At(g.Alloc(virtio.InflightSize(size, features&virtio.FPacked != 0), 64), virtio.InflightSize(size, features&virtio.FPacked != 0))
	mem := g.Memory(t, 1)
	for crash := 0; crash < 30; crash++ {
		drv.send(rnd.IntN(size+1), indirect)
		v := &device{}
		over := life(rnd.IntN(20*size), func() {
			q, err := virtio.NewQueue(virtio.QueueConfig{
				Size: size, Features: features, Memory: mem, Rings: d.Rings(), Base: d.Base(), Inflight: area,
			})
			if err != nil {
				t.Fatal(err)
			}
			v.q = q
			if n := drv.collect(t); n != 0 {
				t.Fatalf("crash %d: a new device shows %d buffers before it serves any", crash, n)
			}
			expected := slices.Clone(drv.out)
			for v.pop(t) {
			}
			if !slices.Equal(v.popped, expected) {
				t.Fatalf("crash %d: popped %v, expected %v", crash, v.popped, expected)
			}
			for range 20 {
				n := rnd.IntN(len(v.held) + 1)
				v.publish(t, rnd, n)
				if got := drv.collect(t); got != n {
					t.Fatalf("crash %d: %d buffers are used, not %d", crash, got, n)
				}
				drv.send(rnd.IntN(size+1), indirect)
				for range rnd.IntN(size + 1) {
					v.pop(t)
				}
			}
		})
		if over {
			continue // the device ends with what it holds, as if killed now
		}
		drv.collect(t)
	}
}
