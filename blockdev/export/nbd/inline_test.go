package nbd

import (
	"bytes"
	"runtime/debug"
	"sync/atomic"
	"testing"

	"qblockd/blockdev/nbdwire"
)

// lonely is a client that sends requests one at a time until the reader serves one itself. That one
// hangs in the device until release is called; its cookie is 1.
func lonely(t *testing.T) (c *client, s *Server, release func()) {
	d := newFileDevice(t, 1<<20)
	d.wouldBlock.Store(true)
	hangs, over := make(chan bool, 1), make(chan struct{})
	var found atomic.Bool
	d.fault = func(op string) error {
		if op != "read" || found.Load() {
			return nil
		}
		found.Store(bytes.Contains(debug.Stack(), []byte("serveAlone")))
		if hangs <- found.Load(); found.Load() {
			<-over
		}
		return nil
	}
	s, _, path := server(t, d, Options{})
	c = open(t, path, nbdwire.Structured)
	q := rd(0, 512)
	q.Cookie = 1
	for range 1000 { // a slow machine may have slow requests in between
		if c.put(q.Append(nil)); <-hangs {
			return c, s, func() { close(over) }
		}
		c.reply(q)
	}
	t.Fatal("workers serve the requests of a client that has but one at a time")
	return nil, nil, nil
}

// A request that the reader serves itself does not keep the next one waiting.
func TestAloneNoLonger(t *testing.T) {
	c, _, release := lonely(t)
	for range 3 * manyAlone {
		if a := c.do(rd(4096, 512)); a.errno != 0 {
			t.Fatalf("errno %d", a.errno)
		}
	}
	release()
	if a := c.reply(nbdwire.Request{Cmd: nbdwire.CmdRead, Len: 512, Cookie: 1}); a.errno != 0 {
		t.Errorf("errno %d", a.errno)
	}
	if a := c.do(wr(0, 512), make([]byte, 512)...); a.errno != 0 {
		t.Errorf("errno %d", a.errno)
	}
}

// A client that goes while the reader serves its request is noticed when that ends.
func TestAloneAndGone(t *testing.T) {
	c, s, release := lonely(t)
	c.nc.Close()
	release()
	eventually(t, "the connection ends", func() bool { return s.count() == 0 })
}

// Workers stay for the next requests, and end when those do not come.
func TestIdleWorkers(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	d.wouldBlock.Store(true)
	s, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	var all []byte
	const n = 8
	for range n {
		q := req(nbdwire.CmdFlush, 0, 0, nil)
		all = q.Append(all)
	}
	c.put(all)
	for range n {
		c.reply(nbdwire.Request{})
	}
	s.mu.Lock()
	var w *workers
	for k := range s.conns {
		w = &k.workers
	}
	s.mu.Unlock()
	running := func() (all, idle int) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.running, len(w.idle)
	}
	if n, _ := running(); n == 0 {
		t.Error("no worker has stayed")
	}
	eventually(t, "no worker is left", func() bool {
		if all, idle := running(); all == idle {
			w.retire()
		}
		all, _ := running()
		return all == 0
	})
	if a := c.do(req(nbdwire.CmdFlush, 0, 0, nil)); a.errno != 0 {
		t.Errorf("errno %d", a.errno)
	}
}

// Where finding out about holes takes another request, a read finds them in what it has read.
func TestHolesInData(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	d.noMap = true
	const k = 64 << 10
	for _, off := range []int64{k, 2*k + 5, 7*k - 1} { // pieces 1, 2, 6 are data
		if _, err := d.f.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	d.wouldBlock.Store(true)
	d.fault = func(op string) error {
		if op == "status" {
			t.Error("it was asked")
		}
		return nil
	}
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	want := make([]byte, 9*k+100)
	if _, err := d.f.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	a := c.do(rd(0, uint32(len(want))))
	if a.errno != 0 || !bytes.Equal(a.data, want) || a.holes != 6*k+100 {
		t.Errorf("errno %d, %d bytes of holes", a.errno, a.holes)
	}
	if a := c.do(rd(10*k, 3*k)); a.errno != 0 || a.holes != 3*k || !bytes.Equal(a.data, make([]byte, 3*k)) {
		t.Errorf("errno %d, %d bytes of holes", a.errno, a.holes)
	}
	if a := c.do(rd(0, 9*k, nbdwire.CmdFlagDF)); a.holes != 0 || !bytes.Equal(a.data, want[:9*k]) {
		t.Errorf("%d bytes of holes in one piece", a.holes)
	}
}
