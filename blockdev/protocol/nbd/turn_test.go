package nbd

import (
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// alone has so many requests answered one at a time that the next one reads its reply itself.
func (w *world) alone() {
	w.t.Helper()
	for range manyAlone + 1 {
		got := w.read(bg, make([]byte, 4096))
		q, _ := w.peer.next()
		w.peer.send(data(q, 1))
		if err := within(w.t, "an answer", got); err != nil {
			w.t.Fatal(err)
		}
	}
}

// turns waits until it is the turn of x to read.
func (w *world) turns(x turn) {
	w.t.Helper()
	w.link.mu.Lock()
	c := w.link.conns[0]
	w.link.mu.Unlock()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		is := c.turn
		c.mu.Unlock()
		if is == x {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("it is the turn of %d, not of %d", is, x)
		}
	}
}

// A request that is alone reads its reply itself, and those of requests that come meanwhile.
func TestReadsItself(t *testing.T) {
	w := newWorld(t, 0)
	w.alone()
	w.turns(nobodys)
	first := w.read(bg, make([]byte, 4096))
	q, _ := w.peer.next()
	w.turns(leads)
	second := w.read(bg, make([]byte, 4096))
	r, _ := w.peer.next()
	w.peer.send(data(r, 2))
	if err := within(t, "an answer", second); err != nil {
		t.Error(err)
	}
	third := w.read(bg, make([]byte, 4096))
	r, _ = w.peer.next()
	w.peer.send(data(q, 3))
	if err := within(t, "an answer", first); err != nil {
		t.Error(err)
	}
	w.turns(runs) // the third did not look after it
	w.peer.send(data(r, 4))
	if err := within(t, "an answer", third); err != nil {
		t.Error(err)
	}
}

// A connection that is lost while a request reads is as any other that is lost.
func TestLostWhileItReads(t *testing.T) {
	w := newWorld(t, 10*time.Second)
	w.alone()
	got := w.read(bg, make([]byte, 4096))
	w.peer.next()
	w.turns(leads)
	w.peer.nc.Close()
	p := w.comeBack()
	q, _ := p.next()
	p.send(data(q, 1))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
}

// So is one that is lost, or broken, while nobody reads.
func TestLostWhileNobodyReads(t *testing.T) {
	w := newWorld(t, 0)
	w.alone()
	w.turns(nobodys)
	w.peer.nc.Close()
	w.clock.Advance(lookTime)
	w.becomes(offline)

	w = newWorld(t, 0)
	w.alone()
	w.turns(nobodys)
	w.peer.send(nbdwire.AppendSimple(nil, 77, 0))
	w.clock.Advance(lookTime)
	w.becomes(broken)

	w = newWorld(t, 0)
	w.alone()
	w.turns(nobodys) // and is closed at the end
}

// So is one that is lost when the watch had ended between the answer and the end of the turn.
func TestLostAfterTheWatch(t *testing.T) {
	for _, before := range []turn{leads, runs} {
		w := newWorld(t, 0)
		w.alone()
		w.turns(nobodys)
		if before == runs {
			w.clock.Advance(lookTime)
			w.turns(runs)
		}
		got := w.read(bg, make([]byte, 4096))
		q, _ := w.peer.next()
		w.turns(before)
		w.link.mu.Lock()
		c := w.link.conns[0]
		w.link.mu.Unlock()
		c.mu.Lock()
		c.watch.Stop()
		c.watched = false
		c.mu.Unlock()
		w.peer.send(data(q, 1))
		if err := within(t, "an answer", got); err != nil {
			t.Error(err)
		}
		w.turns(nobodys)
		w.peer.nc.Close()
		w.clock.Advance(lookTime)
		w.becomes(offline)
	}
}

// A server that does not answer a request that reads itself is given up when that is in the way.
func TestSilentWhileItReads(t *testing.T) {
	w := newWorld(t, 0)
	w.alone()
	got := w.read(bg, make([]byte, 4096))
	w.peer.next()
	w.turns(leads)
	w.DrainBegin()
	for range 2 * int(silence/lookTime) {
		w.clock.Advance(lookTime)
	}
	if err := within(t, "an error", got); err != syscall.EIO {
		t.Error(err)
	}
	w.DrainEnd()
}

// What a server says beyond the reply is a breach.
func TestBreachWhileItReads(t *testing.T) {
	w := newWorld(t, 0)
	w.alone()
	got := w.read(bg, make([]byte, 4096))
	q, _ := w.peer.next()
	w.turns(leads)
	w.peer.send(append(data(q, 1), nbdwire.AppendSimple(nil, 77, 0)...))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
	w.becomes(broken)
}

// Whoever's turn it is when others come and go, somebody reads.
func TestTurnsOfMany(t *testing.T) {
	w := newWorld(t, 0)
	go func() {
		var b [nbdwire.RequestSize]byte
		var q nbdwire.Request
		for {
			if _, err := io.ReadFull(w.peer.nc, b[:]); err != nil || q.Parse(b[:]) != nil {
				return
			}
			if _, err := w.peer.nc.Write(data(q, 1)); err != nil {
				return
			}
		}
	}()
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for range 100 {
				for range rand.N(2 * manyAlone) {
					if err := w.ReadAt(bg, blk.Buf(make([]byte, 512)), 0, 0); err != nil {
						t.Error(err)
						return
					}
				}
				time.Sleep(time.Duration(rand.N(1000)) * time.Microsecond)
			}
		})
	}
	over := make(chan struct{})
	go func() { all.Wait(); close(over) }()
	within(t, "the end", over)
}
