package qcow2

import (
	"testing"
	"testing/synctest"

	"qblockd/graph/blk"
)

// TestPanicsHoldNobodyUp: a request that has panicked, of which the node is told, leaves nobody
// waiting for it: neither those that wait already, nor those that come later, nor who closes the
// image.
func TestPanicsHoldNobodyUp(t *testing.T) {
	const cs, far, last = 64 << 10, 512 << 20, 1<<30 - 1024
	write := func(s *image, off, n int64) error { return s.WriteAt(req(), blk.Buf(make([]byte, n)), off, 0) }
	read := func(s *image, off int64) error { return s.ReadAt(req(), blk.Buf(make([]byte, 512)), off, 0) }
	overwrite := func(s *image) error { return write(s, 512, 512) }
	flush := func(s *image) error { return s.Flush(req()) }
	for name, c := range map[string]struct {
		written []int64 // before
		at      blk.DebugEvent
		bad     func(s *image) error   // panics
		waiting []func(s *image) error // what waits for it meanwhile; none where it holds the lock
	}{
		"allocation": {nil, blk.EvCowRead, overwrite, []func(s *image) error{
			overwrite,
			func(s *image) error { return s.Zero(req(), 0, cs, 0) },
			func(s *image) error { return s.Zero(req(), 0, 512, 0) },
			func(s *image) error { return s.Discard(req(), 0, cs) },
			func(s *image) error { return s.WriteAt(req(), blk.Buf(make([]byte, cs)), 0, blk.Compressed) },
		}},
		"compressed": {nil, blk.EvWriteCompressed,
			func(s *image) error { return s.WriteAt(req(), blk.Buf(make([]byte, cs)), 0, blk.Compressed) },
			[]func(s *image) error{overwrite}},
		"flush": {[]int64{512}, blk.EvL2Update, flush, []func(s *image) error{
			flush, func(s *image) error { return s.Resize(req(), 1<<31, blk.PreallocOff) }}},
		"allocating":          {nil, blk.EvClusterAlloc, overwrite, nil},
		"lookup of a read":    {[]int64{far}, blk.EvL2Load, func(s *image) error { return read(s, far) }, nil},
		"lookup of a write":   {[]int64{far}, blk.EvL2Load, func(s *image) error { return write(s, far, 512) }, nil},
		"lookup of a status":  {[]int64{far}, blk.EvL2Load, func(s *image) error { _, err := s.Status(req(), far, 512); return err }, nil},
		"lookup of a mapping": {[]int64{far}, blk.EvL2Load, func(s *image) error { return s.Map(req(), far, 512, &blk.Mapping{}) }, nil},
		"punching": {[]int64{far}, blk.EvClusterFree,
			func(s *image) error { _ = s.Discard(req(), far, cs); return flush(s) }, nil},
		"the end of a cluster": {[]int64{last}, blk.EvWriteAio, func(s *image) error { return s.Resize(req(), 1<<31, blk.PreallocOff) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := mustCreate(t, CreateOptions{Size: 1<<30 - 512})
				s := mustOpen(t, mem{f}, config{unmap: true})
				for _, off := range c.written {
					if err := write(s, off, 512); err != nil {
						t.Fatal(err)
					}
				}
				if c.at != blk.EvL2Update { // which needs something to write
					mustClose(t, s)
					s = mustOpen(t, mem{f}, config{unmap: true})
				}
				panicsOnce(t, s, c.at, c.bad, c.waiting)
			})
		})
	}
}

// panicsOnce makes bad panic at its first step of that kind while others wait for it.
func panicsOnce(t *testing.T, s *image, at blk.DebugEvent, bad func(s *image) error, waiting []func(s *image) error) {
	errs := make(chan error)
	armed := true
	s.debug = func(_ *blk.Req, e blk.DebugEvent) {
		if e != at || !armed {
			return
		}
		armed = false
		for _, f := range waiting {
			go func() { errs <- f(s) }()
		}
		if len(waiting) > 0 {
			synctest.Wait()
		}
		panic("a bug")
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Fatal("it does not get there")
			}
		}()
		_ = bad(s)
	}()
	synctest.Wait() // who can go on before the node is told does so
	s.NodeFailed()
	for range waiting {
		if err := <-errs; err == nil {
			t.Error("who waited succeeds")
		}
	}
	if err := s.ReadAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err == nil {
		t.Error("a read succeeds")
	}
	if err := s.Inactivate(req()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestFailingMeanwhile: a write that waits for a flush writes nothing if the image is given up
// meanwhile.
func TestFailingMeanwhile(t *testing.T) {
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: 1 << 20})}, config{})
	for i := range 2 {
		if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); (err == nil) != (i == 0) {
			t.Error(i, err)
		}
		s.mu.Lock()
		s.quarantine.pendBytes = maxPending // a flush is due
		s.mu.Unlock()
		s.debug = func(_ *blk.Req, e blk.DebugEvent) {
			if e == blk.EvL2Update {
				s.dead.Store(true)
			}
		}
	}
}
