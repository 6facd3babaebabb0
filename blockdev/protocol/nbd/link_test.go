package nbd

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// A request under way when the connection is lost is sent again when the server is back in time.
func TestSentAgain(t *testing.T) {
	w := newWorld(t, 10*time.Second)
	b := make([]byte, 4096)
	got := w.read(bg, b)
	q, _ := w.peer.next()
	w.peer.nc.Close()
	w.becomes(waiting)
	later := w.read(bg, make([]byte, 4096)) // comes while nobody is there
	p := w.comeBack()
	for range 2 {
		again, _ := p.next()
		if again.Cmd != q.Cmd || again.Off != q.Off || again.Len != q.Len {
			t.Errorf("%+v was sent again as %+v", q, again)
		}
		p.send(data(again, 5))
	}
	for _, c := range []<-chan error{got, later} {
		if err := within(t, "an answer", c); err != nil {
			t.Error(err)
		}
	}
	if !bytes.Equal(b, bytes.Repeat([]byte{5}, 4096)) {
		t.Error("wrong data")
	}
}

// After reconnect-delay requests fail, until the server is back; attempts go on.
func TestTooLate(t *testing.T) {
	w := newWorld(t, 3*time.Second)
	got := w.read(bg, make([]byte, 4096))
	w.peer.next()
	w.peer.nc.Close()
	w.becomes(waiting)
	w.refuse()
	w.clock.Advance(3 * time.Second)
	if err := within(t, "an error", got); err != syscall.EIO {
		t.Error(err)
	}
	if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO {
		t.Error(err)
	}
	for again := true; again; {
		w.clock.Advance(time.Second) // until the pause has begun and is over
		select {
		case <-w.tries:
			again = false
		case <-time.After(time.Millisecond):
		}
	}
	w.tries <- struct{}{} // for comeBack
	p := w.comeBack()
	w.becomes(connected)
	got = w.read(bg, make([]byte, 4096))
	q, _ := p.next()
	p.send(data(q, 1))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
}

// Without a reconnect-delay requests fail at once. The next one asks for the server and fails, too.
func TestNoDelay(t *testing.T) {
	w := newWorld(t, 0)
	got := w.read(bg, make([]byte, 4096))
	w.peer.next()
	w.peer.nc.Close()
	if err := within(t, "an error", got); err != syscall.EIO {
		t.Error(err)
	}
	w.becomes(offline)
	if len(w.tries) > 0 {
		t.Error("an attempt that nobody asked for")
	}
	if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO {
		t.Error(err)
	}
	p := w.comeBack()
	w.becomes(connected)
	got = w.read(bg, make([]byte, 4096))
	q, _ := p.next()
	p.send(data(q, 1))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
}

// A server that comes back with something else is not taken.
func TestAnotherExport(t *testing.T) {
	for what, change := range map[string]func(*export){
		"size": func(e *export) { e.size *= 2 }, "flags": func(e *export) { e.flags &^= nbdwire.FlagFUA },
		"read-only":    func(e *export) { e.flags |= nbdwire.FlagReadOnly },
		"alignment":    func(e *export) { e.minBlock, e.maxBlock = 512, 1<<20 },
		"block status": func(e *export) { e.status = false },
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t, 0)
			change(&w.back)
			w.peer.nc.Close()
			w.becomes(offline)
			if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO {
				t.Error(err)
			}
			p := w.comeBack()
			_ = p.nc.SetReadDeadline(time.Now().Add(patience))
			if n, err := p.nc.Read(make([]byte, 100)); n > 0 || err == nil || errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("%d bytes, %v", n, err)
			}
			w.becomes(offline)
		})
	}
}

// A drain lets no request wait for a server that is away, nor for one that is silent.
func TestDrain(t *testing.T) {
	w := newWorld(t, time.Hour)
	silent := w.read(bg, make([]byte, 4096))
	q, _ := w.peer.next()
	other := w.read(bg, make([]byte, 4096))
	q2, _ := w.peer.next()
	w.DrainBegin()
	w.clock.Advance(silence - 1)
	w.peer.send(data(q2, 1))
	if err := within(t, "an answer", other); err != nil || len(silent) > 0 {
		t.Fatalf("%v, or given up early", err)
	}
	w.clock.Advance(lookTime) // who answers has another 5 s
	w.peer.send(data(q, 1)[:1000])
	w.becomes(connected)
	w.clock.Advance(silence - 1)
	if len(silent) > 0 {
		t.Fatal("given up early")
	}
	w.clock.Advance(lookTime) // but not who answers byte by byte
	if err := within(t, "an error", silent); err != syscall.EIO {
		t.Error(err)
	}
	if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO || !w.Quiet() {
		t.Errorf("while drained: %v, quiet %v", err, w.Quiet())
	}
	w.DrainEnd()
	held := w.read(bg, make([]byte, 4096))
	for end := time.Now().Add(patience); w.Quiet(); {
		if time.Now().After(end) {
			t.Fatal("the request does not wait")
		}
		time.Sleep(time.Millisecond)
	}
	w.DrainBegin()
	if err := within(t, "an error", held); err != syscall.EIO {
		t.Error(err)
	}
	w.DrainEnd()
}

// The end of a node waits for nothing.
func TestCloseWhileAway(t *testing.T) {
	w := newWorld(t, time.Hour)
	w.peer.nc.Close()
	w.becomes(waiting)
	if err := w.Inactivate(bg); err != nil {
		t.Error(err)
	}
	if err := w.Flush(bg); err != syscall.EIO {
		t.Error(err)
	}
	w.Close()
}

// A request of a root that is torn down gets rid of a silent server, not of one that answers.
func TestCancelled(t *testing.T) {
	w := newWorld(t, 0)
	ctx, cancel := context.WithCancel(context.Background())
	got := w.read(&blk.Req{Ctx: ctx}, make([]byte, 4096))
	q, _ := w.peer.next()
	cancel()
	w.peer.send(data(q, 9))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
	got = w.read(&blk.Req{Ctx: ctx}, make([]byte, 4096))
	w.peer.next()
	for len(got) == 0 {
		w.clock.Advance(silence)
		time.Sleep(time.Millisecond)
	}
	if err := <-got; err != syscall.EIO {
		t.Error(err)
	}
}

// Nobody waits who must not.
func TestNoWait(t *testing.T) {
	w := newWorld(t, 0)
	if err := w.ReadAt(&blk.Req{NoWait: true}, blk.Buf(make([]byte, 512)), 0, 0); err != blk.ErrWouldBlock {
		t.Error(err)
	}
}
