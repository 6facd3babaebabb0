package qcow2

import (
	"syscall"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	"qblockd/graph/blk"
)

// discards is a file that calls f before it discards.
type discards struct {
	mem
	f *func()
}

func (d discards) Discard(r *blk.Req, off, n int64) error {
	if *d.f != nil {
		(*d.f)()
	}
	return d.mem.Discard(r, off, n)
}

// TestSpaceThatIsBeingGivenBack: who finds no space while some is being given back waits for that.
func TestSpaceThatIsBeingGivenBack(t *testing.T) {
	const cs, n = 512, 3 * maxBatch
	synctest.Test(t, func(t *testing.T) {
		var f func()
		img := mustCreate(t, CreateOptions{Size: n * cs, ClusterSize: ptr(uint64(cs))})
		s := mustOpen(t, discards{mem{img}, &f}, config{unmap: true})
		if err := s.WriteAt(req(), blk.Buf(make([]byte, n*cs)), 0, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Discard(req(), 0, n*cs); err != nil {
			t.Fatal(err)
		}
		found := make(chan bool, 1)
		f = func() {
			f = nil
			if !s.keepsBack() {
				t.Error("nothing is kept back")
			}
			go func() { found <- s.giveSpace(req(), syscall.ENOSPC) }()
			synctest.Wait()
			if len(found) > 0 {
				t.Error("nobody waits")
			}
		}
		if err := s.Flush(req()); err != nil {
			t.Fatal(err)
		}
		if !<-found {
			t.Error("there is no space")
		}
		mustClose(t, s)
	})
}

// TestBatch: batches together touch each cluster as often as the ranges do, in their order, and
// none touches more than it may.
func TestBatch(t *testing.T) {
	const cb = 9
	rapid.Check(t, func(t *rapid.T) {
		var l []freed
		var want, got []int64
		add := func(to *[]int64, f freed) {
			for c := f.off >> cb; c<<cb < f.off+f.n; c++ {
				*to = append(*to, c)
			}
		}
		for range rapid.IntRange(1, 8).Draw(t, "ranges") {
			f := freed{off: rapid.Int64Range(0, 1<<30).Draw(t, "off"), n: rapid.Int64Range(1, 3*maxBatch<<cb).Draw(t, "n")}
			if rapid.Bool().Draw(t, "aligned") {
				f.off &^= 1<<cb - 1
			}
			l = append(l, f)
			add(&want, f)
		}
		for len(l) > 0 {
			var now []freed
			before := len(got)
			now, l = batch(l, cb)
			for _, f := range now {
				add(&got, f)
			}
			if n := len(got) - before; n > maxBatch || n < maxBatch && len(l) > 0 {
				t.Fatalf("a batch of %d clusters, and more to come: %v", n, len(l) > 0)
			}
		}
		if len(got) != len(want) {
			t.Fatalf("%d clusters, want %d", len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("cluster %d is %d, want %d", i, got[i], want[i])
			}
		}
	})
}
