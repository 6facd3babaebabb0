package nbd

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// piece is a chunk of n bytes of c in reply to q, at bytes behind its beginning.
func piece(q nbdwire.Request, at, n int, c byte) []byte {
	head := nbdwire.Structured.AppendDataHead(nil, 0, &q, q.Off+uint64(at), n)
	return append(head, bytes.Repeat([]byte{c}, n)...)
}

// Chunks that have what others had break the protocol, also where there are enough bytes in sum. So
// does what never ends.
func TestMoreBreaches(t *testing.T) {
	type request = nbdwire.Request
	hole := func(q request, at, n int) []byte {
		return nbdwire.Structured.AppendHole(nil, 0, &q, q.Off+uint64(at), uint32(n))
	}
	failure := func(q request) []byte {
		b := nbdwire.Structured.AppendError(nil, &q, nbdwire.EIO, "")
		b[5] = 0 // not the last
		return b
	}
	for what, answer := range map[string]func(q request) []byte{
		"overlap": func(q request) []byte {
			return slices.Concat(piece(q, 0, 2048, 1), piece(q, 1024, 2048, 1), done(q))
		},
		"overlap behind": func(q request) []byte {
			return slices.Concat(piece(q, 2048, 2048, 1), piece(q, 1024, 2048, 1), done(q))
		},
		"the same twice": func(q request) []byte {
			return slices.Concat(piece(q, 0, 2048, 1), piece(q, 0, 2048, 2), done(q))
		},
		"hole over data": func(q request) []byte {
			return slices.Concat(piece(q, 0, 2048, 1), hole(q, 512, 512), piece(q, 2560, 1536, 1), done(q))
		},
		"between": func(q request) []byte {
			return slices.Concat(piece(q, 0, 1024, 1), piece(q, 2048, 1024, 1), piece(q, 1024, 2048, 1), done(q))
		},
		"a gap": func(q request) []byte {
			return slices.Concat(piece(q, 0, 1024, 1), piece(q, 1025, 3071, 1), done(q))
		},
		"errors without end": func(q request) []byte { return bytes.Repeat(failure(q), maxErrors+1) },
		"many pieces": func(q request) (b []byte) {
			for i := range maxGaps + 1 {
				b = append(b, piece(q, 2*i, 1, 1)...)
			}
			return b
		},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t, 1000)
			got := w.read(bg, make([]byte, 4096))
			q, _ := w.peer.next()
			w.peer.send(answer(q))
			if err := within(t, "an error", got); err != syscall.EIO {
				t.Error(err)
			}
			w.becomes(broken)
		})
	}
}

// A request that no server survives fails in the end. The time that requests wait goes on while
// servers come and answer nothing, and attempts become rare.
func TestPoison(t *testing.T) {
	w := newWorld(t, 20*time.Second)
	got := w.read(bg, make([]byte, 4096))
	w.peer.next()
	w.peer.nc.Close()
	start, starts := w.clock.Now(), []time.Duration{}
	for p := w.comeBack(); ; {
		starts = append(starts, w.clock.Now().Sub(start))
		p.next()
		p.nc.Close()
		w.becomes(waiting)
		for w.rests() {
			w.clock.Advance(firstPause)
		}
		if len(w.tries) == 0 { // nobody waits for the server any more
			break
		}
		p = w.comeBack()
	}
	if err := within(t, "an error", got); err != syscall.EIO {
		t.Error(err)
	}
	const ms = time.Millisecond
	want := []time.Duration{0, 100 * ms, 300 * ms, 700 * ms, 1500 * ms, 3100 * ms, 6300 * ms, 12700 * ms}
	if !slices.Equal(starts, want) {
		t.Errorf("servers came back after %v, want %v", starts, want)
	}
	w.becomes(offline)
}

// Where servers answer other requests, the one that they do not survive is sent ten times.
func TestPoisonAmongOthers(t *testing.T) {
	w := newWorld(t, time.Hour)
	poison := w.read(bg, make([]byte, 4096))
	p := w.peer
	for i := range maxSends {
		if i > 0 {
			p = w.comeBack()
		}
		bad, _ := p.next()
		good := w.read(bg, make([]byte, 4096))
		q, _ := p.next()
		p.send(data(q, 1))
		if err := within(t, "an answer", good); err != nil || bad.Cookie == q.Cookie {
			t.Fatal(err)
		}
		if len(poison) > 0 {
			t.Fatalf("failed after %d", i)
		}
		p.nc.Close()
	}
	if err := within(t, "an error", poison); err != syscall.EIO {
		t.Error(err)
	}
}

// A server that is idle and goes away is waited for anew, however often.
func TestIdleLoss(t *testing.T) {
	w := newWorld(t, 5*time.Second)
	p := w.peer
	for range 3 {
		p.nc.Close()
		w.becomes(waiting)
		for w.rests() {
			w.clock.Advance(time.Second / 2)
		}
		p = w.comeBack()
		w.becomes(connected)
		w.clock.Advance(10 * time.Second)
	}
	p.nc.Close()
	w.becomes(waiting)
	got := w.read(bg, make([]byte, 4096))
	w.rests()
	w.clock.Advance(4 * time.Second)
	p = w.comeBack()
	q, _ := p.next()
	p.send(data(q, 1))
	if err := within(t, "an answer", got); err != nil {
		t.Error(err)
	}
}

// Who is torn down while it sends to a server that takes nothing gets rid of it, too.
func TestCancelledWhileSending(t *testing.T) {
	w := newWorld(t, 0)
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 1)
	go func() { got <- w.WriteAt(&blk.Req{Ctx: ctx}, blk.Buf(make([]byte, 16<<20)), 0, 0) }()
	b := make([]byte, 1)
	if _, err := w.peer.nc.Read(b); err != nil { // it is under way
		t.Fatal(err)
	}
	cancel()
	for end := time.Now().Add(patience); len(got) == 0; {
		if time.Now().After(end) {
			t.Fatal("it waits for the server")
		}
		w.clock.Advance(lookTime)
		time.Sleep(time.Millisecond)
	}
	if err := <-got; err != syscall.EIO {
		t.Error(err)
	}
}

// log collects what is logged.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// The log says whether what is lost with a connection was flushed.
func TestUnflushed(t *testing.T) {
	for _, c := range []struct {
		name string
		do   []func(w *world) error
		want string
	}{
		{"nothing", nil, "unflushed=false"},
		{"write", []func(w *world) error{write(0)}, "unflushed=true"},
		{"FUA", []func(w *world) error{write(blk.FUA)}, "unflushed=false"},
		{"flush", []func(w *world) error{write(0), flush}, "unflushed=false"},
		{"write after flush", []func(w *world) error{write(0), flush, write(0)}, "unflushed=true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 0)
			var l log
			slog.SetDefault(slog.New(slog.NewTextHandler(&l, nil))) // until the world ends
			for _, do := range c.do {
				got := make(chan error, 1)
				go func() { got <- do(w) }()
				q, _ := w.peer.next()
				w.peer.send(done(q))
				if err := within(t, "an answer", got); err != nil {
					t.Fatal(err)
				}
			}
			w.peer.nc.Close()
			w.becomes(offline)
			l.mu.Lock()
			defer l.mu.Unlock()
			if got := l.b.String(); !strings.Contains(got, c.want) {
				t.Errorf("%s is not in %q", c.want, got)
			}
		})
	}
}

func write(f blk.Flags) func(w *world) error {
	return func(w *world) error { return w.WriteAt(bg, blk.Buf(make([]byte, 512)), 0, f) }
}

func flush(w *world) error { return w.Flush(bg) }
