package copy

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// TestGuestsComeFirst: while guests are about, one extent at a time is copied, on a thread on which
// nobody else runs; two where there are none.
func TestGuestsComeFirst(t *testing.T) {
	for _, busy := range []bool{true, false} {
		var needs []Action
		for range 20 {
			needs = append(needs, Data, Skip)
		}
		b := newBench(needs...)
		b.guests = new(atomic.Bool)
		b.guests.Store(busy)
		var now, most atomic.Int32
		var shared atomic.Bool        // somebody else ran on the thread of a copy
		second := make(chan struct{}) // closed when two are at work
		b.during = func(off int64) {
			b.guests.Store(busy)
			other := make(chan int)
			go func() { other <- syscall.Gettid() }()
			if <-other == syscall.Gettid() {
				shared.Store(true)
			}
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
				if n == 2 {
					close(second)
				}
			}
			if !busy {
				<-second
			}
			runtime.Gosched()
			now.Add(-1)
		}
		m, j, _ := start(t, b, types.BlockdevOnErrorReport)
		if _, err := ended(m, j); err != nil {
			t.Fatal(err)
		}
		if got, want := most.Load(), map[bool]int32{true: 1, false: 2}[busy]; got != want {
			t.Errorf("guests %v: %d at once, want %d", busy, got, want)
		}
		if busy && shared.Load() {
			t.Error("others run on the thread that copies")
		}
	}
}

// TestEmptyPartsArePassedInFewSteps: what is looked at grows while nothing is to do, and a copy is
// never longer than a chunk, unless it is of zeroes and the task says so.
func TestEmptyPartsArePassedInFewSteps(t *testing.T) {
	const chunk, size = int64(1 << 20), int64(1) << 60
	for _, long := range []bool{false, true} {
		for _, fails := range []int64{-1, 0, 4 << 50, size - chunk} {
			var looks int
			var copied [3]int64
			var most [3]int64
			q := &quiet{}
			q.cond = sync.NewCond(&q.mu)
			m := jobs.NewManager(q, nil)
			failing := 2
			spec := jobs.Spec{ID: "j", Type: types.JobTypeStream, Block: true, ManualDismiss: true}
			spec.Runner = runner(func(h *jobs.Handle) error {
				h.SetRemaining(size)
				b := newBench(Data)
				return Run(h, Task{Gate: b, Size: size, Chunk: chunk, LongZeroes: long, Workers: 1,
					Operation: types.IoOperationTypeRead, Policy: types.BlockdevOnErrorIgnore,
					RetryIgnored: true,
					Look: func(_ *blk.Req, off, n int64) (Extent, error) {
						looks++
						if fails >= off && fails < off+n && failing > 0 {
							if n <= chunk {
								failing--
							}
							return Extent{}, syscall.EIO
						}
						for _, x := range mostlyEmpty(size) {
							if long && x.a == Zero && off >= x.at && off < x.end {
								n = x.end - off // as far as it knows
							}
							if off < x.end {
								return Extent{N: min(n, x.end-off), Action: x.a}, nil
							}
						}
						panic("beyond the end")
					},
					Copy: counted(func(_ *blk.Req, off int64, e Extent) error {
						copied[e.Action] += e.N
						most[e.Action] = max(most[e.Action], e.N)
						return nil
					})})
			})
			j, err := m.Create(spec)
			if err != nil {
				t.Fatal(err)
			}
			m.Start(j)()
			info, err := ended(m, j)
			if info.CurrentProgress != size || err != nil {
				t.Errorf("long %v fails %d: %v, progress %d", long, fails, err, info.CurrentProgress)
			}
			if copied[Data] != 10<<20 || copied[Zero] != 1<<30-10<<20 || most[Data] > chunk || !long && most[Zero] > chunk {
				t.Errorf("long %v fails %d: copied %v, at most %v at once", long, fails, copied, most)
			}
			want := 1200
			if long {
				want = 100
			}
			if fails >= 0 {
				want += 1500 // it goes up to the byte that fails in steps that get shorter
			}
			if looks > want {
				t.Errorf("long %v fails %d: %d looks", long, fails, looks)
			}
		}
	}
}

// TestPiecesBesideGuests: while there are guests an extent of data is copied piece by piece, and
// nothing behind a piece that failed.
func TestPiecesBesideGuests(t *testing.T) {
	for name, c := range map[string]struct {
		busy   bool
		failed int64
		want   []int64
	}{
		"alone":   {false, -1, []int64{0, 30}},
		"guests":  {true, -1, []int64{0, 10, 20, 30}},
		"failure": {true, 10, []int64{0, 10}},
	} {
		b := newBench(Data, Data, Data, Zero, Zero)
		b.piece, b.guests = b.cell, new(atomic.Bool)
		b.guests.Store(c.busy)
		b.failed[c.failed] = 1
		var mu sync.Mutex
		var at []int64
		b.during = func(off int64) {
			mu.Lock()
			defer mu.Unlock()
			at = append(at, off)
			b.guests.Store(c.busy)
		}
		m, j, _ := start(t, b, types.BlockdevOnErrorReport)
		_, err := ended(m, j)
		slices.Sort(at)
		if failed := c.failed >= 0; (err != nil) != failed || !slices.Equal(at, c.want) {
			t.Errorf("%s: %v, copied at %v, want %v", name, err, at, c.want)
		}
	}
}

type part struct {
	at, end int64
	a       Action
}

// mostlyEmpty has 10 MiB of data at 4 PiB, 1 GiB of zeroes behind them, and nothing else.
func mostlyEmpty(size int64) []part {
	const data, zeroes, rest = 4 << 50, 4<<50 + 10<<20, 4<<50 + 1<<30
	return []part{{0, data, Skip}, {data, zeroes, Data}, {zeroes, rest, Zero}, {rest, size, Skip}}
}
