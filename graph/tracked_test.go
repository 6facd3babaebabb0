package graph

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"qblockd/graph/blk"
)

func TestTrackShardSize(t *testing.T) {
	if s := unsafe.Sizeof(trackShard{}); s != 64 {
		t.Errorf("a shard has %d bytes", s)
	}
}

// Many plain and serialising requests at once: whenever a serialising one runs, nothing that
// overlaps runs; all come to an end; nothing stays registered.
func TestTracker(t *testing.T) {
	const cells, workers, rounds = 32, 12, 300
	var tr tracker
	var plain, serial [cells]atomic.Int32
	var wg sync.WaitGroup
	var refused atomic.Int32
	for w := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 9))
			r := &blk.Req{Ctx: context.Background()}
			for range rounds {
				off := rng.Int64N(cells)
				n := 1 + rng.Int64N(min(6, cells-off))
				ser := rng.IntN(3) == 0
				r.NoWait = rng.IntN(4) == 0
				k, err := tr.begin(r, off, n, ser)
				if err != nil {
					if err != blk.ErrWouldBlock || !r.NoWait {
						t.Errorf("begin: %v", err)
					}
					refused.Add(1)
					continue
				}
				count := &plain
				if ser {
					count = &serial
				}
				for c := off; c < off+n; c++ {
					mine := count[c].Add(1)
					other := serial[c].Load()
					if ser {
						other = plain[c].Load()
					}
					if other != 0 || ser && mine != 1 {
						t.Errorf("cell %d: serialising %v, %d of its kind, %d of the other", c, ser, mine, other)
					}
				}
				for c := off; c < off+n; c++ {
					count[c].Add(-1)
				}
				tr.end(k)
			}
		})
	}
	wg.Wait()
	if tr.serial.Load() != 0 {
		t.Error("serialising requests left")
	}
	for i := range tr.shards {
		if tr.shards[i].head != nil {
			t.Error("requests left")
		}
	}
	t.Logf("%d refused", refused.Load())
}

// A unit of work goes on inside its own lock, plain or serialising, while others wait for that
// lock.
func TestTrackerInsideOwnLock(t *testing.T) {
	var tr tracker
	ctx := t.Context()
	mine, other := &blk.Req{Ctx: ctx}, &blk.Req{Ctx: ctx}
	lock, err := tr.begin(mine, 0, 100, true)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		k, err := tr.begin(other, 50, 100, true)
		if err != nil {
			t.Error(err)
			return
		}
		tr.end(k)
	})
	for tr.serial.Load() < 2 { // the other one is in the list, and waits
		runtime.Gosched()
	}
	mine.NoWait = true
	for _, serial := range []bool{false, true} {
		k, err := tr.begin(mine, 60, 10, serial)
		if err != nil {
			t.Errorf("serialising %v: %v", serial, err)
			continue
		}
		tr.end(k)
	}
	tr.end(lock)
	wg.Wait()
}
