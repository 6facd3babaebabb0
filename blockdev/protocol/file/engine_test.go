package file

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// TestEngineCrowd lets more callers than there are slots write and read back their own blocks.
func TestEngineCrowd(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		const callers, rounds, block = 2 * engineDepth, 4, 4096
		d := open("crowd", callers*block)
		if d.engine != nil {
			d.engine.batch = 7
		}
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				want, got := pattern(block, byte(i)), buf(block)
				for k := range rounds {
					want[0] = byte(k)
					if err := d.WriteAt(bg, blk.Buf(want), int64(i)*block, 0); err != nil {
						t.Error(err)
						return
					}
					if err := d.ReadAt(bg, blk.Buf(got), int64(i)*block, 0); err != nil || !bytes.Equal(got, want) {
						t.Errorf("caller %d: %v", i, err)
						return
					}
				}
			})
		}
		wg.Wait()
		if err := d.Flush(bg); err != nil {
			t.Error(err)
		}
	})
}

// TestEngineEnds: closing a node ends its goroutine and its descriptors.
func TestEngineEnds(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		fds, routines := openFDs(t), runtime.NumGoroutine()
		d := open("ends", 1<<20)
		if err := d.WriteAt(bg, blk.Buf(pattern(4096, 1)), 0, 0); err != nil {
			t.Fatal(err)
		}
		d.Close()
		waitFDs(t, fds)
		for runtime.NumGoroutine() > routines {
			runtime.Gosched()
		}
	})
}

// TestEngineErrors: errors of the kernel come back as they are, also those at submission.
func TestEngineErrors(t *testing.T) {
	eachPlace(t, func(t *testing.T, open func(string, int64) *disk) {
		d := open("errors", 1<<20)
		if d.engine == nil {
			t.Skip("no engine")
		}
		if _, err := d.engine.do(bg, opRead, -1, blk.Buf(buf(512)), 0, 0, 0); err != unix.EBADF {
			t.Errorf("bad descriptor: %v", err)
		}
		if err := d.WriteAt(bg, blk.Buf(pattern(4096, 1)), 0, blk.FUA); err != nil { // holes take any alignment
			t.Fatal(err)
		}
		if d.direct {
			if _, err := d.engine.do(bg, opRead, d.cur.Load().fd, blk.Buf(buf(512)[1:]), 0, 1, 0); err != unix.EINVAL {
				t.Errorf("not aligned: %v", err)
			}
		}
		if err := d.ReadAt(bg, blk.Buf(buf(512)), 0, 0); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		// All slots taken: the wait for one ends with the root.
		var taken []*slot
		for range engineDepth {
			s, err := d.engine.slot(bg)
			if err != nil {
				t.Fatal(err)
			}
			taken = append(taken, s)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := d.ReadAt(&blk.Req{Ctx: ctx}, blk.Buf(buf(512)), 0, 0); !errors.Is(err, unix.ECANCELED) {
			t.Errorf("no slot: %v", err)
		}
		for _, s := range taken {
			d.engine.free <- s
		}
	})
}
