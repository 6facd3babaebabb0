package copy

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// counted makes a Task.Copy of what copies all or nothing.
func counted(f func(r *blk.Req, off int64, e Extent) error) func(r *blk.Req, off int64, e Extent) (int64, error) {
	return func(r *blk.Req, off int64, e Extent) (int64, error) { return All(e.N, f(r, off, e)) }
}

// With however many workers, and whichever is faster, progress at a failing byte is what lies
// before it, and of two failing bytes the first is reported.
func TestProgressAtAFailingByte(t *testing.T) {
	const size, chunk = 64, 2
	for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorReport, types.BlockdevOnErrorStop} {
		for round := range 40 {
			r := rand.New(rand.NewPCG(uint64(round), 1))
			first := chunk * r.Int64N(size/chunk-3)
			second := first + chunk*(1+r.Int64N(2))
			q := &quiet{}
			q.cond = sync.NewCond(&q.mu)
			m := jobs.NewManager(q, nil)
			b := newBench(Data)
			var mended atomic.Bool
			j, err := m.Create(jobs.Spec{ID: "j", Type: types.JobTypeStream, Block: true, ManualDismiss: true,
				Runner: runner(func(h *jobs.Handle) error {
					h.SetRemaining(size)
					return Run(h, Task{
						Gate: b, Size: size, Chunk: chunk, Workers: 4, Policy: policy, Operation: types.IoOperationTypeRead,
						Look: func(_ *blk.Req, off, n int64) (Extent, error) {
							if off%6 == 0 && off != first && off != second {
								return Extent{N: chunk}, nil
							}
							return Extent{N: chunk, Action: Data}, nil
						},
						Copy: counted(func(_ *blk.Req, off int64, e Extent) error {
							for range (off * 7919 % 31) * int64(round%3) {
								runtime.Gosched()
							}
							if !mended.Load() && (off == first || off == second) {
								return syscall.EIO
							}
							return nil
						})})
				})})
			if err != nil {
				t.Fatal(err)
			}
			m.Start(j)()
			at := func() string {
				l := m.Query()
				return fmt.Sprintf("%d of %d", l[0].CurrentProgress, l[0].TotalProgress)
			}
			want := fmt.Sprintf("%d of %d", first, size)
			if policy == types.BlockdevOnErrorStop {
				q.status(types.JobStatusPaused)
				if at() != want {
					t.Errorf("stopped at %s instead of %s", at(), want)
				}
				mended.Store(true)
				if err := j.Resume(); err != nil {
					t.Fatal(err)
				}
				want = fmt.Sprintf("%d of %d", size, size)
			}
			<-j.Finished()
			if at() != want {
				t.Errorf("%s: ends at %s instead of %s", policy, at(), want)
			}
			if err := j.Dismiss(); err != nil {
				t.Error(err)
			}
		}
	}
}
