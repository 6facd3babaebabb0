package virtio_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// variants are the kinds of queues.
var variants = []struct {
	name     string
	features uint64
	indirect bool
}{
	{"split", virtio.FVersion1, false},
	{"split-event", virtio.FVersion1 | virtio.FEventIdx, false},
	{"split-indirect", virtio.FVersion1 | virtio.FIndirect | virtio.FEventIdx, true},
	{"packed", virtio.FVersion1 | virtio.FPacked, false},
	{"packed-event", virtio.FVersion1 | virtio.FPacked | virtio.FEventIdx, false},
	{"packed-indirect", virtio.FVersion1 | virtio.FPacked | virtio.FIndirect | virtio.FEventIdx, true},
}

// newQueue is a device's end of d in so many regions.
func newQueue(t testing.TB, d *virtiotest.Driver, regions int) *virtio.Queue {
	t.Helper()
	return newTracked(t, d, regions, nil)
}

// newArea is memory for what is in flight in d.
func newArea(d *virtiotest.Driver) []byte {
	return make([]byte, virtio.InflightSize(d.Size, d.Features&virtio.FPacked != 0))
}

// newTracked is newQueue with an area of what is in flight.
func newTracked(t testing.TB, d *virtiotest.Driver, regions int, area []byte) *virtio.Queue {
	t.Helper()
	q, err := virtio.NewQueue(virtio.QueueConfig{
		Size: d.Size, Features: d.Features, Memory: d.G.Memory(t, regions), Rings: d.Rings(), Base: d.Base(), Inflight: area,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Close)
	return q
}

// echo is a buffer that the device answers with what it reads, each byte plus one.
type echo struct {
	bufs   []virtiotest.Buf
	outLen int
	inLen  int
	seed   byte
}

// newEcho cuts random places of guest memory into a buffer; arena is where, for this one alone.
func newEcho(g *virtiotest.Guest, rnd *rand.Rand, arena uint64, size int, bufs int) *echo {
	e := &echo{seed: byte(rnd.Uint32())}
	outs := rnd.IntN(bufs + 1)
	for i := range bufs {
		n := 1 + rnd.IntN(size/bufs)
		b := virtiotest.Buf{Addr: arena, Len: uint32(n), Write: i >= outs}
		arena += uint64(n)
		if b.Write {
			e.inLen += n
		} else {
			fill(g.At(b.Addr, n), e.seed, e.outLen)
			e.outLen += n
		}
		e.bufs = append(e.bufs, b)
	}
	return e
}

func fill(b []byte, seed byte, from int) {
	for i := range b {
		b[i] = seed + byte(from+i)*3
	}
}

// serve does what the device has to do with an echo.
func serve(c *virtio.Chain) (written uint32) {
	var got []byte
	for _, b := range c.Out() {
		got = append(got, b...)
	}
	if uint64(len(got)) != c.OutLen() {
		panic("OutLen")
	}
	i := 0
	for _, b := range c.In() {
		for j := range b {
			b[j] = byte(i)
			if i < len(got) {
				b[j] = got[i] + 1
			}
			i++
		}
	}
	if uint64(i) != c.InLen() {
		panic("InLen")
	}
	return uint32(i)
}

// check tells what is wrong with the answer.
func (e *echo) check(g *virtiotest.Guest, written uint32) error {
	if int(written) != e.inLen {
		return fmt.Errorf("written %d of %d", written, e.inLen)
	}
	out := make([]byte, e.outLen)
	fill(out, e.seed, 0)
	i := 0
	for _, f := range e.bufs {
		b := g.At(f.Addr, int(f.Len))
		if !f.Write {
			continue
		}
		for _, v := range b {
			want := byte(i)
			if i < len(out) {
				want = out[i] + 1
			}
			if v != want {
				return fmt.Errorf("byte %d of %d is %d, want %d", i, e.inLen, v, want)
			}
			i++
		}
	}
	return nil
}

// TestQueues sends random buffers through both ends, with random batches and orders.
func TestQueues(t *testing.T) {
	for _, v := range variants {
		for _, size := range []int{1, 2, 8, 64} {
			t.Run(fmt.Sprintf("%s/%d", v.name, size), func(t *testing.T) {
				testQueue(t, v.features, v.indirect, size, size == 8)
			})
		}
	}
}

func testQueue(t *testing.T, features uint64, indirect bool, size int, tracked bool) {
	const arena, rounds = 2048, 2000
	rnd := rand.New(rand.NewPCG(1, uint64(size)))
	g := virtiotest.NewGuest(t, 4<<20)
	d := virtiotest.NewDriver(g, size, features)
	var arenas []uint64
	for range size {
		arenas = append(arenas, g.Alloc(arena, 1))
	}
	var area []byte
	if tracked {
		area = newArea(d)
	}
	q := newTracked(t, d, 1000, area) // regions are pages: much of what is sent spans some
	var popped []*virtio.Chain
	sent, done := 0, 0
	for sent < rounds || d.InFlight() > 0 {
		switch rnd.IntN(4) {
		case 0:
			for range rnd.IntN(size + 1) {
				if len(arenas) == 0 || sent == rounds {
					break
				}
				e := newEcho(g, rnd, arenas[0], arena, 1+rnd.IntN(min(size, 6)))
				at := arenas[0]
				if _, ok := d.Add([2]any{e, at}, e.bufs, indirect && rnd.IntN(4) > 0); ok {
					arenas = arenas[1:]
					sent++
				}
			}
		case 1:
			c := &virtio.Chain{}
			if ok, err := q.Pop(c); err != nil {
				t.Fatal(err)
			} else if ok {
				popped = append(popped, c)
			}
		case 2:
			rnd.Shuffle(len(popped), func(i, j int) { popped[i], popped[j] = popped[j], popped[i] })
			n := rnd.IntN(len(popped) + 1)
			for _, c := range popped[:n] {
				if err := q.Put(c, serve(c)); err != nil {
					t.Fatal(err)
				}
			}
			popped = popped[n:]
			if _, err := q.Publish(); err != nil {
				t.Fatal(err)
			}
		case 3:
			token, written, ok := d.Used()
			if !ok {
				continue
			}
			e, at := token.([2]any)[0].(*echo), token.([2]any)[1].(uint64)
			if err := e.check(g, written); err != nil {
				t.Fatalf("buffer %d: %v", done, err)
			}
			arenas = append(arenas, at)
			done++
		}
	}
	if done != rounds || q.InFlight() != 0 {
		t.Errorf("%d of %d came back, %d in flight", done, rounds, q.InFlight())
	}
}

// TestNotifications has both ends sleep whenever they may: who is not woken hangs.
func TestNotifications(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			const size, rounds = 16, 20000
			g := virtiotest.NewGuest(t, 1<<20)
			d := virtiotest.NewDriver(g, size, v.features)
			q := newQueue(t, d, 2)
			kick, call := make(chan struct{}, 1), make(chan struct{}, 1)
			served := make(chan error, 1)
			go func() { served <- serveUntil(q, kick, call, rounds) }()
			calls := drive(t, d, kick, call, rounds, v.indirect)
			if err := <-served; err != nil {
				t.Fatal(err)
			}
			t.Logf("%d notifications for %d buffers", calls, rounds)
		})
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// serveUntil is a device that has served n buffers.
func serveUntil(q *virtio.Queue, kick, call chan struct{}, n int) error {
	var cs [8]virtio.Chain
	for n > 0 {
		if err := q.DisableKicks(); err != nil {
			return err
		}
		k := 0
		for ; k < len(cs); k++ {
			if ok, err := q.Pop(&cs[k]); err != nil {
				return err
			} else if !ok {
				break
			}
		}
		for i := range k {
			if err := q.Put(&cs[i], serve(&cs[i])); err != nil {
				return err
			}
		}
		notify, err := q.Publish()
		if err != nil {
			return err
		}
		if notify {
			wake(call)
		}
		if n -= k; k > 0 || n == 0 {
			continue
		}
		if more, err := q.EnableKicks(); err != nil {
			return err
		} else if !more {
			<-kick
		}
	}
	return nil
}

// drive is a driver that has n buffers served; it returns how often it was notified.
func drive(t *testing.T, d *virtiotest.Driver, kick, call chan struct{}, n int, indirect bool) (calls int) {
	rnd := rand.New(rand.NewPCG(2, 3))
	var arenas []uint64
	for range d.Size {
		arenas = append(arenas, d.G.Alloc(256, 1))
	}
	for unsent := n; n > 0; {
		d.Interrupts(false)
		for unsent > 0 && len(arenas) > 0 && rnd.IntN(8) > 0 {
			e := newEcho(d.G, rnd, arenas[0], 256, 1+rnd.IntN(3))
			kicks, ok := d.Add([2]any{e, arenas[0]}, e.bufs, indirect)
			if !ok {
				break
			}
			if kicks {
				wake(kick)
			}
			arenas = arenas[1:]
			unsent--
		}
		for {
			token, written, ok := d.Used()
			if !ok {
				break
			}
			if err := token.([2]any)[0].(*echo).check(d.G, written); err != nil {
				t.Fatal(err)
			}
			arenas = append(arenas, token.([2]any)[1].(uint64))
			n--
		}
		if d.InFlight() > 0 && !d.Interrupts(true) {
			<-call
			calls++
		}
	}
	return calls
}

// TestPutOrder: used buffers come in the order in which they were put.
func TestPutOrder(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			g := virtiotest.NewGuest(t, 1<<20)
			d := virtiotest.NewDriver(g, 16, v.features)
			q := newQueue(t, d, 1)
			at := g.Alloc(64, 1)
			var cs [5]virtio.Chain
			for i := range cs {
				d.Add(i, []virtiotest.Buf{{Addr: at + uint64(i), Len: 1, Write: true}}, v.indirect)
				if ok, err := q.Pop(&cs[i]); !ok || err != nil {
					t.Fatal(ok, err)
				}
			}
			order := []int{3, 1, 4, 0, 2}
			for _, i := range order {
				cs[i].In()[0][0] = byte(i)
				if err := q.Put(&cs[i], 1); err != nil {
					t.Fatal(err)
				}
				if _, _, ok := d.Used(); ok {
					t.Fatal("shown before it was published")
				}
			}
			if _, err := q.Publish(); err != nil {
				t.Fatal(err)
			}
			for _, i := range order {
				if token, written, ok := d.Used(); !ok || token != i || written != 1 {
					t.Errorf("%v, %v, %v, want %d", token, written, ok, i)
				}
			}
			if !bytes.Equal(g.At(at, 5), []byte{0, 1, 2, 3, 4}) {
				t.Errorf("%v", g.At(at, 5))
			}
		})
	}
}

// TestBase: a queue stops and another goes on where it stood.
func TestBase(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			g := virtiotest.NewGuest(t, 1<<20)
			d := virtiotest.NewDriver(g, 8, v.features)
			at := g.Alloc(64, 1)
			base := d.Base()
			for i := range 100 {
				q, err := virtio.NewQueue(virtio.QueueConfig{
					Size: 8, Features: d.Features, Memory: g.Memory(t, 1), Rings: d.Rings(), Base: base,
				})
				if err != nil {
					t.Fatal(err)
				}
				for j := range 3 {
					d.Add(3*i+j, []virtiotest.Buf{{Addr: at, Len: 1, Write: true}}, v.indirect)
				}
				for j := range 3 {
					var c virtio.Chain
					if ok, err := q.Pop(&c); !ok || err != nil {
						t.Fatal(ok, err)
					}
					if err := q.Put(&c, 0); err != nil {
						t.Fatal(err)
					}
					if _, err := q.Publish(); err != nil {
						t.Fatal(err)
					}
					if token, _, ok := d.Used(); !ok || token != 3*i+j {
						t.Fatal(token, ok)
					}
				}
				base = q.Base()
				q.Close()
				if _, err := q.Pop(&virtio.Chain{}); err == nil {
					t.Fatal("a closed queue pops")
				}
			}
		})
	}
}
