package throttle

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/events/clock"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// newClock is a clock for groups, to be moved by Step.
func newClock() *clock.Manual { return clock.NewManual(time.Unix(1000, 0)) }

func limit(i int, r rate) Limits {
	l := NoLimits()
	if r.length == 0 {
		r.length = 1
	}
	l.rates[i] = r
	return l
}

// passes counts the requests of n bytes that pass at once.
func passes(t *testing.T, m *Member, dir direction, n int64) (k int) {
	t.Helper()
	for {
		_, err := m.enter(&blk.Req{NoWait: true}, dir, n)
		if errors.Is(err, blk.ErrWouldBlock) {
			return k
		}
		if err != nil {
			t.Fatal(err)
		}
		if k++; k > 1e6 {
			t.Fatal("no limit")
		}
	}
}

// TestRates: how much passes at once, and in each of the seconds that follow when everybody takes
// what they can.
func TestRates(t *testing.T) {
	for _, c := range []struct {
		name string
		l    Limits
		dir  direction
		n    int64
		once int
		then []int
	}{
		// A bucket that is full to the brim still takes one more.
		{"average", limit(iopsTotal, rate{avg: 100}), reading, 512, 11, []int{100, 100}},
		{"bytes", limit(bpsWrite, rate{avg: 10240}), writing, 512, 3, []int{20, 20}},
		{"other direction", limit(bpsWrite, rate{avg: 1}), reading, 512, 1e6 + 1, nil},
		{"burst", limit(iopsRead, rate{avg: 10, max: 100}), reading, 512, 101, []int{10, 10}},
		{
			"long burst", limit(iopsRead, rate{avg: 10, max: 100, length: 3}), reading, 512, 11,
			[]int{100, 100, 100, 30, 10, 10},
		},
		{
			"size", func() Limits { l := limit(iopsWrite, rate{avg: 100}); l.size = 1024; return l }(), writing, 4096, 3,
			[]int{25, 25},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := newClock()
			m := NewGroup("g", c.l, now).Join()
			if c.once > 1e6 {
				if _, err := m.enter(&blk.Req{NoWait: true}, c.dir, c.n); err != nil || waiting(m.g) != [2]int{} {
					t.Error(err)
				}
				m.Leave()
				return
			}
			if k := passes(t, m, c.dir, c.n); k != c.once {
				t.Errorf("%d at once, want %d", k, c.once)
			}
			for i, want := range c.then {
				k := 0
				for range 1000 {
					now.Step(time.Millisecond)
					k += passes(t, m, c.dir, c.n)
				}
				if k < want-1 || k > want+1 {
					t.Errorf("second %d: %d, want %d", i, k, want)
				}
			}
			m.Leave()
		})
	}
}

// TestRefund: what did not take place leaves no trace, whatever became of the limits meanwhile.
func TestRefund(t *testing.T) {
	g := NewGroup("g", limit(bpsTotal, rate{avg: 1000}), newClock())
	m := g.Join()
	defer m.Leave()
	for range 10 {
		p, err := m.enter(&blk.Req{NoWait: true}, writing, 1e6)
		if err != nil {
			t.Fatal(err)
		}
		m.adjust(p, writing, 1e6, 0)
	}
	p, err := m.enter(&blk.Req{NoWait: true}, writing, 1e6)
	if err != nil {
		t.Fatal(err)
	}
	g.SetLimits(limit(bpsTotal, rate{avg: 2000}))
	if _, err := m.enter(&blk.Req{NoWait: true}, writing, 300); err != nil {
		t.Fatal(err)
	}
	m.adjust(p, writing, 1e6, 0)
	if _, err := m.enter(&blk.Req{NoWait: true}, writing, 1); !errors.Is(err, blk.ErrWouldBlock) {
		t.Errorf("a request of before the change was given back: %v", err)
	}
}

// crowd are requests that wait.
type crowd struct {
	t    *testing.T
	g    *Group
	got  chan int // who passed
	errs chan error
}

// send makes a request in a goroutine and returns when it waits.
func (c *crowd) send(m *Member, who int, dir direction, ctx context.Context) {
	c.g.mu.Lock()
	before := c.g.waiting[dir]
	c.g.mu.Unlock()
	go func() {
		if _, err := m.enter(&blk.Req{Ctx: ctx}, dir, 1); err != nil {
			c.errs <- err
			return
		}
		c.got <- who
	}()
	for {
		c.g.mu.Lock()
		n := c.g.waiting[dir]
		c.g.mu.Unlock()
		if n > before {
			return
		}
		runtime.Gosched()
	}
}

func newCrowd(t *testing.T, l Limits) (*crowd, *clock.Manual) {
	now := newClock()
	return &crowd{t, NewGroup("g", l, now), make(chan int, 1000), make(chan error, 1000)}, now
}

// one lets time pass until just one request goes on and tells which.
func (c *crowd) one(now *clock.Manual, d time.Duration) int {
	c.t.Helper()
	now.Step(d)
	who := <-c.got
	if len(c.got) != 0 {
		c.t.Fatalf("two requests passed")
	}
	return who
}

func waiting(g *Group) [2]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.waiting
}

// TestTurns: members go by turns however many requests each has, in the order of each, and so do
// reads and writes.
func TestTurns(t *testing.T) {
	c, now := newCrowd(t, limit(iopsTotal, rate{avg: 10}))
	a, b, z := c.g.Join(), c.g.Join(), c.g.Join()
	passes(t, a, reading, 1)
	for i := range 6 {
		c.send(a, i, reading, nil)
	}
	for i := range 2 {
		c.send(b, 10+i, reading, nil)
	}
	c.send(z, 20, writing, nil)
	var order []int
	for range 9 {
		order = append(order, c.one(now, 100*time.Millisecond))
	}
	// The write takes its turn after the first read.
	want := []int{0, 20, 10, 1, 11, 2, 3, 4, 5}
	for i := range want {
		if order[i] != want[i] {
			t.Fatalf("order %v, want %v", order, want)
		}
	}
	z.Leave()
	a.Leave()
	if c.g.Retire() {
		t.Error("retired with a member")
	}
	b.Leave()
	if !c.g.Retire() || c.g.Join() != nil {
		t.Error("not retired")
	}
}

// TestLetGo: those who wait go on when their context ends, when the limits go, and when a drain
// waits for them.
func TestLetGo(t *testing.T) {
	c, now := newCrowd(t, limit(iopsTotal, rate{avg: 1}))
	a, b := c.g.Join(), c.g.Join()
	passes(t, a, writing, 1)
	ctx, cancel := context.WithCancelCause(context.Background())
	gone := errors.New("gone")
	c.send(a, 0, writing, nil)
	c.send(a, 1, writing, ctx)
	c.send(a, 2, writing, nil)
	cancel(gone)
	if err := <-c.errs; err != gone {
		t.Error(err)
	}
	if n := waiting(c.g); n != [2]int{writing: 2} {
		t.Errorf("waiting: %v", n)
	}
	c.send(b, 10, writing, nil)
	a.Open()
	if x, y := <-c.got, <-c.got; x+y != 2 || len(c.got) != 0 {
		t.Error("drained:", x, y)
	}
	if _, err := a.enter(&blk.Req{NoWait: true}, writing, 1); err != nil {
		t.Error("while drained:", err)
	}
	a.Shut()
	if _, err := a.enter(&blk.Req{NoWait: true}, writing, 1); !errors.Is(err, blk.ErrWouldBlock) {
		t.Error("after the drain:", err)
	}
	now.Step(2 * time.Second)
	if len(c.got) != 0 {
		t.Error("what the drain let through was not counted")
	}
	c.g.SetLimits(NoLimits())
	if x := <-c.got; x != 10 {
		t.Error(x)
	}
	a.Leave()
	b.Leave()
}

// TestDrain: a drain of a graph does not wait for the limits.
func TestDrain(t *testing.T) {
	g := drivertest.NewGraph(t)
	file := drivertest.AddNode(t, g, "mem", drivertest.NewMemFile(1<<20))
	c, _ := newCrowd(t, limit(bpsTotal, rate{avg: 1}))
	n := throttled(t, g, file, c.g, false)
	root := drivertest.AddRoot(t, g, n, perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All})
	done := make(chan error)
	const many = 4
	for i := range many {
		go func() {
			r, err := root.Begin(context.Background())
			if err == nil {
				err = root.WriteAt(r, blk.Buf(make([]byte, 4096)), int64(i)*4096, 0)
				root.End(r)
			}
			done <- err
		}()
	}
	for waiting := 0; waiting != many-1; {
		runtime.Gosched()
		c.g.mu.Lock()
		waiting = c.g.waiting[writing]
		c.g.mu.Unlock()
	}
	undrain, err := g.Drain(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	for range many {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	undrain()
}

// TestCost: no request allocates that does not wait.
func TestCost(t *testing.T) {
	l := limit(bpsTotal, rate{avg: maxValue})
	m := NewGroup("g", l, nil).Join()
	defer m.Leave()
	r := &blk.Req{}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := m.enter(r, reading, 4096); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEnter(b *testing.B) {
	for name, l := range map[string]Limits{"none": NoLimits(), "limited": limit(bpsTotal, rate{avg: maxValue})} {
		b.Run(name, func(b *testing.B) {
			m := NewGroup("g", l, nil).Join()
			r := &blk.Req{}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := m.enter(r, reading, 4096); err != nil {
					b.Fatal(err)
				}
			}
			m.Leave()
		})
	}
}

var _ graph.Drainer = (*filter)(nil)
