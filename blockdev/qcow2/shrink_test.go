package qcow2

import (
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// TestShrinkFails: when shrinking fails, at whichever call, the size is what it was, and shrinking again works.
func TestShrinkFails(t *testing.T) {
	const cs, clusters, left = 512, 200, 30
	for i := 0; ; i++ {
		img := mustCreate(t, CreateOptions{Size: cs * clusters, ClusterSize: ptr(uint64(cs)), RefcountBits: ptr(int64(64))})
		f := drivertest.NewFault(img)
		s := mustOpen(t, mem{f}, config{unmap: true})
		if err := s.WriteAt(req(), blk.Buf(make([]byte, cs*clusters)), 0, 0); err != nil {
			t.Fatal(err)
		}
		f.FailAt(i, syscall.EIO)
		err := s.Resize(req(), cs*left, blk.PreallocOff)
		struck := f.Failed() > 0
		f.Clear()
		if err != nil {
			if n := s.size.Load(); n != cs*clusters {
				t.Fatalf("call %d: %v, and the size is %d", i, err, n)
			}
			if err := s.Resize(req(), cs*left, blk.PreallocOff); err != nil {
				t.Fatalf("call %d: again: %v", i, err)
			}
		}
		if n := s.size.Load(); n != cs*left {
			t.Fatalf("call %d: the size is %d", i, n)
		}
		mustClose(t, s)
		s = mustOpen(t, mem{img}, config{readOnly: true})
		sound(t, s, true)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if !struck {
			break
		}
	}
}
