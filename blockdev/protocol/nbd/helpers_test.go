package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/events/clock"
	"qblockd/graph/blk"
)

// patience bounds each wait of the tests; nothing comes near it unless it hangs.
const patience = 20 * time.Second

var bg = &blk.Req{Ctx: context.Background()}

// pair is a connection within the process.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("unix", path); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// peer is the server's end of a connection in transmission, which a test plays.
type peer struct {
	t  testing.TB
	nc net.Conn
}

// next reads the next request; the data of a write come along.
func (p *peer) next() (q nbdwire.Request, data []byte) {
	p.t.Helper()
	_ = p.nc.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, nbdwire.RequestSize)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatal(err)
	}
	if err := q.Parse(b); err != nil {
		p.t.Fatal(err)
	}
	if q.Cmd == nbdwire.CmdWrite {
		data = make([]byte, q.Len)
		if _, err := io.ReadFull(p.nc, data); err != nil {
			p.t.Fatal(err)
		}
	}
	return q, data
}

func (p *peer) send(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

// data is a whole answer to a read: n bytes of c.
func data(q nbdwire.Request, c byte) []byte {
	b := nbdwire.Structured.AppendDataHead(nil, nbdwire.ChunkDone, &q, q.Off, int(q.Len))
	return append(b, bytes.Repeat([]byte{c}, int(q.Len))...)
}

func done(q nbdwire.Request) []byte {
	return nbdwire.Structured.AppendChunk(nil, nbdwire.ChunkDone, nbdwire.ChunkNone, &q, 0)
}

// world is a disk whose servers are played by the test: each connection comes from dialled.
type world struct {
	*disk
	t       testing.TB
	clock   *clock.Manual
	peer    *peer         // of the first connection
	dialled chan net.Conn // what attempts to connect get
	tries   chan struct{} // one for each attempt that waits for that
	back    export        // what servers that come back say
}

var all = export{
	size: 1 << 20, structured: true, status: true, context: 7,
	flags: nbdwire.FlagHasFlags | nbdwire.FlagFlush | nbdwire.FlagFUA | nbdwire.FlagTrim | nbdwire.FlagWriteZeroes,
}

func newWorld(t testing.TB, delay time.Duration) *world {
	t.Helper()
	return newWorldOf(t, delay, func(*export) {})
}

// newWorldOf is newWorld with another export.
func newWorldOf(t testing.TB, delay time.Duration, change func(e *export)) *world {
	t.Helper()
	return newWorldWith(t, delay, change, 1)
}

// newWorldWith is newWorldOf with that many connections.
func newWorldWith(t testing.TB, delay time.Duration, change func(e *export), connections int) *world {
	t.Helper()
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	e := all
	change(&e)
	w := &world{t: t, clock: clock.NewManual(time.Unix(0, 0)), back: e}
	w.dialled, w.tries = make(chan net.Conn), make(chan struct{}, 100)
	w.disk = newDisk(&server{context: nbdwire.ContextAllocation}, &e, "node", delay, w.clock)
	w.link.dial = func(ctx context.Context) (net.Conn, *export, error) {
		w.tries <- struct{}{}
		select {
		case nc := <-w.dialled:
			if nc == nil {
				return nil, nil, os.ErrNotExist
			}
			e := w.back
			return nc, &e, nil
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
	nc, s := pair(t)
	w.peer, w.link.most = &peer{t, s}, connections
	w.link.start(nc, &e)
	t.Cleanup(func() {
		w.Close()
		slog.SetDefault(old)
	})
	return w
}

// within waits for something.
func within[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("%s does not come", what)
	}
	return v
}

// read issues a read of 4 KiB in the background.
func (w *world) read(r *blk.Req, b []byte) <-chan error {
	c := make(chan error, 1)
	go func() { c <- w.ReadAt(r, blk.Buf(b), 4096, 0) }()
	return c
}

// comeBack lets the attempt that is under way succeed, and is the server's end.
func (w *world) comeBack() *peer {
	nc, s := pair(w.t)
	within(w.t, "an attempt to connect", w.tries)
	select {
	case w.dialled <- nc:
	case <-time.After(patience):
		w.t.Fatal("the attempt has gone")
	}
	return &peer{w.t, s}
}

// rests waits until the link makes its pause before the next attempt to connect, and tells whether
// it does: else the attempt is under way, or requests wait no longer.
func (w *world) rests() bool {
	w.t.Helper()
	const timers = 2 // of the reconnect-delay, of the pause
	for end := time.Now().Add(patience); w.clock.Pending() < timers; runtime.Gosched() {
		w.link.mu.Lock()
		over := w.link.state == offline
		w.link.mu.Unlock()
		if over || len(w.tries) > 0 {
			return false
		}
		if time.Now().After(end) {
			w.t.Fatal("no attempt to connect, and no pause before one")
		}
	}
	return true
}

// refuse lets the attempt that is under way fail.
func (w *world) refuse() {
	within(w.t, "an attempt to connect", w.tries)
	w.dialled <- nil
}

// state waits until the link has that state.
func (w *world) becomes(s state) {
	w.t.Helper()
	for end := time.Now().Add(patience); ; {
		w.link.mu.Lock()
		is, changed := w.link.state, w.link.changed
		w.link.mu.Unlock()
		if is == s {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("state %d, want %d", is, s)
		}
		within(w.t, "a change of state", changed)
	}
}

func put64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
