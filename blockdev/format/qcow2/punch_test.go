package qcow2

import (
	"bytes"
	"testing"
	"testing/synctest"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// slowPunch is a file whose discards end when they are let go.
type slowPunch struct {
	mem
	begun, let chan struct{}
}

func (f slowPunch) Discard(r *blk.Req, off, n int64) error {
	f.begun <- struct{}{}
	<-f.let
	return f.mem.Discard(r, off, n)
}

// TestPunchHoldsUpNobody: while the space of discarded clusters that keep their places is given
// back, requests to the rest of the disk go on, and what is written to the same clusters waits and
// is there in the end.
func TestPunchHoldsUpNobody(t *testing.T) {
	for name, o := range map[string]CreateOptions{
		"no-unref": {}, "no-unref extended": {Extended: true},
		"data file": {Data: drivertest.NewMemFile(0)}, "data file extended": {Data: drivertest.NewMemFile(0), Extended: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testPunch(t, o) })
		})
	}
}

func testPunch(t *testing.T, o CreateOptions) {
	o.Size = 1 << 20
	const cs = 64 << 10
	slow := slowPunch{begun: make(chan struct{}, 1), let: make(chan struct{})}
	var f file = mem{mustCreate(t, o)}
	c := config{unmap: true}
	if o.Data != nil {
		slow.mem = mem{o.Data}
		c.external = slow
	} else {
		slow.mem = f.(mem)
		f, c.options = slow, Options{DiscardNoUnref: ptr(true)}
	}
	s := mustOpen(t, f, c)
	write := func(off int64, with byte) error {
		return s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{with}, cs)), off, 0)
	}
	read := func(off int64, want byte) {
		t.Helper()
		b := make([]byte, cs)
		if err := s.ReadAt(req(), blk.Buf(b), off, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{want}, cs)) {
			t.Errorf("at %d: %v, %d instead of %d", off, err, b[0], want)
		}
	}
	for i := range int64(4) {
		if err := write(i*cs, 1); err != nil {
			t.Fatal(err)
		}
	}
	over, written := make(chan error, 1), make(chan error, 1)
	go func() { over <- s.Discard(req(), cs, cs) }()
	<-slow.begun
	read(cs, 0)
	if err := write(3*cs, 2); err != nil { // in place
		t.Error(err)
	}
	if err := write(8*cs, 3); err != nil { // allocates
		t.Error(err)
	}
	if err := s.Flush(req()); err != nil {
		t.Error(err)
	}
	go func() { written <- write(cs, 4) }()
	synctest.Wait()
	select {
	case <-written:
		t.Error("it was written to a place that is being punched")
	default:
	}
	r := req()
	r.NoWait = true
	if err := s.WriteAt(r, blk.Buf(make([]byte, 512)), cs, 0); err != blk.ErrWouldBlock {
		t.Errorf("NoWait: %v", err)
	}
	close(slow.let)
	if err := <-over; err != nil {
		t.Error(err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	for i, want := range map[int64]byte{0: 1, 1: 4, 2: 1, 3: 2, 8: 3} {
		read(i*cs, want)
	}
	mustClose(t, s)
}
