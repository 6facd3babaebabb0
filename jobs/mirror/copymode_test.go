package mirror_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"qblockd/graph/blk"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// The mode of a mirror changes to and fro while guests write what overlaps; both sides are equal in
// the end.
func TestCopyModeToAndFro(t *testing.T) {
	for range 5 {
		w := newWorld(t)
		j := w.start(w.args(types.MirrorCopyModeBackground))
		var guests, changes sync.WaitGroup
		over := make(chan struct{})
		changes.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-over:
					return
				default:
				}
				if err := j.ChangeCopyMode(modes[i%2]); err != nil {
					t.Error(err)
				}
			}
		})
		for g := range 4 {
			guests.Go(func() {
				r := rand.New(rand.NewPCG(uint64(g), 13))
				for i := range 300 {
					n := 512 * (1 + r.Int64N(64))
					p := bytes.Repeat([]byte{byte(i), byte(g)}, int(n/2))
					if err := jobtest.Write(w.guest, 512*r.Int64N(4*granule/512), p); err != nil {
						t.Error(err)
					}
				}
			})
		}
		guests.Wait()
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		close(over)
		changes.Wait()
		j.Cancel(false)
		if err := w.end(j, "source"); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.from.Bytes(), w.to.Bytes()) {
			t.Fatal("the two sides differ")
		}
	}
}

// In write-blocking mode a write that has ended is in the target; after a change to background it
// need not be, and after one back it is again.
func TestCopyModeChanges(t *testing.T) {
	w := newWorld(t)
	j := w.start(w.args(types.MirrorCopyModeWriteBlocking))
	if !w.Await(ready) {
		t.Fatal(j.Err())
	}
	n := byte(0)
	inStep := func() bool {
		n++
		p, got := bytes.Repeat([]byte{n}, 4096), make([]byte, 4096)
		if err := jobtest.Write(w.guest, granule, p); err != nil {
			t.Fatal(err)
		}
		if err := w.to.ReadAt(&blk.Req{Ctx: context.Background()}, blk.Buf(got), granule, 0); err != nil {
			t.Fatal(err)
		}
		return bytes.Equal(got, p)
	}
	change := func(to types.MirrorCopyMode) {
		if err := j.ChangeCopyMode(to); err != nil {
			t.Fatal(err)
		}
	}
	limit := time.Now().Add(time.Minute)
	for range 100 {
		if !inStep() {
			t.Fatal("write-blocking: a write is not in the target")
		}
	}
	change(types.MirrorCopyModeBackground)
	for inStep() {
		if time.Now().After(limit) {
			t.Fatal("background: all writes wait for the target")
		}
	}
	change(types.MirrorCopyModeWriteBlocking)
	for run := 0; run < 1000; run++ {
		if !inStep() {
			run = -1
		}
		if time.Now().After(limit) {
			t.Fatal("write-blocking again: writes do not wait for the target")
		}
	}
	j.Cancel(false)
	if err := w.end(j, "source"); err != nil {
		t.Fatal(err)
	}
}
