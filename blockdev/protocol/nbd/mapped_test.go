package nbd

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// fileOf makes a file of n random bytes, which are in memory.
func fileOf(t *testing.T, n int) (*os.File, []byte) {
	t.Helper()
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f, b
}

// copyFrom issues a copy of n bytes of f in the background.
func (w *world) copyFrom(f *os.File, from, n, off int64, fl blk.Flags) <-chan error {
	c := make(chan error, 1)
	go func() { c <- w.CopyFrom(bg, off, []blk.HostRange{{FD: int(f.Fd()), Off: from, N: n}}, fl) }()
	return c
}

// conn is the connection in use.
func (w *world) conn() *conn {
	c, _, err := w.link.get(bg, false)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// A range of a file is one write, however long, with the file's bytes.
func TestCopyFrom(t *testing.T) {
	for _, extended := range []bool{false, true} {
		w := newWorldOf(t, 0, func(e *export) { e.extended = extended })
		f, want := fileOf(t, 700_000)
		err := w.copyFrom(f, 4097, 600<<10, 65536, blk.FUA)
		head := make([]byte, nbdwire.RequestSize)
		if extended {
			head = make([]byte, nbdwire.ExtRequestSize)
		}
		if _, err := io.ReadFull(w.peer.nc, head); err != nil {
			t.Fatal(err)
		}
		q := nbdwire.Request{Cmd: nbdwire.CmdWrite, Flags: nbdwire.CmdFlagFUA, Off: 65536, Len: 600 << 10}
		if q.Cookie = maxInFlight; extended {
			q.Flags |= nbdwire.CmdFlagPayload
			if !bytes.Equal(head, q.AppendExt(nil)) {
				t.Errorf("% x", head)
			}
		} else if !bytes.Equal(head, q.Append(nil)) {
			t.Errorf("% x", head)
		}
		got := make([]byte, q.Len)
		if _, err := io.ReadFull(w.peer.nc, got); err != nil || !bytes.Equal(got, want[4097:][:q.Len]) {
			t.Errorf("the bytes of the file do not come: %v", err)
		}
		if extended {
			w.peer.send(nbdwire.Extended.AppendChunk(nil, nbdwire.ChunkDone, nbdwire.ChunkNone, &q, 0))
		} else {
			w.peer.send(done(q))
		}
		if err := within(t, "the end of the copy", err); err != nil {
			t.Error(err)
		}
	}
}

// Longer ones than the server takes are several writes.
func TestCopyFromInPieces(t *testing.T) {
	w := newWorldOf(t, 0, func(e *export) { e.minBlock, e.maxBlock = 4096, 128<<10 })
	f, want := fileOf(t, 320<<10)
	err := w.copyFrom(f, 0, 320<<10, 4096, 0)
	for _, x := range []struct{ off, n int }{{0, 128 << 10}, {128 << 10, 128 << 10}, {256 << 10, 64 << 10}} {
		q, got := w.peer.next()
		if q.Off != uint64(4096+x.off) || !bytes.Equal(got, want[x.off:][:x.n]) {
			t.Errorf("a write of %d bytes at %d", len(got), q.Off)
		}
		w.peer.send(done(q))
	}
	if err := within(t, "the end of the copy", err); err != nil {
		t.Error(err)
	}
}

// What cannot be sent by the kernel, or would be waited for, is refused, and nothing is sent.
func TestCopyFromRefused(t *testing.T) {
	w := newWorldOf(t, 0, func(e *export) { e.minBlock, e.size = 4096, 1<<20 })
	f, _ := fileOf(t, 256<<10)
	sparse, _ := fileOf(t, 64<<10)
	if err := sparse.Truncate(256 << 10); err != nil {
		t.Fatal(err)
	}
	at := func(f *os.File, off, n int64) blk.HostRange { return blk.HostRange{FD: int(f.Fd()), Off: off, N: n} }
	full := at(f, 0, 128<<10)
	direct := full
	direct.Direct = true
	for what, c := range map[string]struct {
		r    *blk.Req
		off  int64
		src  []blk.HostRange
		want error
	}{
		"little":            {bg, 0, []blk.HostRange{at(f, 0, 32<<10)}, blk.ErrNotSupported},
		"beyond the end":    {bg, 1<<20 - 64<<10, []blk.HostRange{full}, blk.ErrNotSupported},
		"parts of blocks":   {bg, 0, []blk.HostRange{at(f, 0, 65000), at(f, 65000, 66072)}, blk.ErrNotSupported},
		"not in memory":     {bg, 0, []blk.HostRange{full, at(sparse, 0, 256<<10)}, blk.ErrNotSupported},
		"past the cache":    {bg, 0, []blk.HostRange{direct}, blk.ErrNotSupported},
		"no waiting":        {&blk.Req{Ctx: bg.Ctx, NoWait: true}, 0, []blk.HostRange{full}, blk.ErrWouldBlock},
		"none of the files": {bg, 0, []blk.HostRange{{FD: 1 << 20, N: 128 << 10}}, blk.ErrNotSupported},
	} {
		if err := w.CopyFrom(c.r, c.off, c.src, 0); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := w.conn().moved.Load(); n != 0 {
		t.Errorf("%d bytes were sent", n)
	}
	c := newConn(&scripted{}, w.e, w.clock)
	if _, _, err := c.do(bg, nbdwire.Request{}, body{file: full}); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("a connection that takes no pages: %v", err)
	}
}

// Where the file turns out to have less, zeroes stand for the rest: the connection goes on, and it
// is copied by hand.
func TestCopyFromShortFile(t *testing.T) {
	w := newWorld(t, 0)
	f, want := fileOf(t, 100_000)
	got := make(chan error, 1)
	go func() {
		q := nbdwire.Request{Cmd: nbdwire.CmdWrite, Len: 700_000}
		_, err := w.link.do(bg, q, body{file: blk.HostRange{FD: int(f.Fd()), N: 700_000}})
		got <- err
	}()
	q, data := w.peer.next()
	if !bytes.Equal(data[:len(want)], want) || !blk.IsZero(data[len(want):]) {
		t.Error("other bytes than those of the file and zeroes")
	}
	w.peer.send(done(q))
	if err := within(t, "the end of the copy", got); !errors.Is(err, blk.ErrNotSupported) {
		t.Error(err)
	}
	err := w.read(bg, make([]byte, 4096))
	q, _ = w.peer.next()
	w.peer.send(data4k(q))
	if err := within(t, "the next request", err); err != nil {
		t.Error(err)
	}
}

func data4k(q nbdwire.Request) []byte { return data(q, 1) }

// A server that answers before it has taken the bytes does not end the copy, which would end the
// lease of the pages.
func TestCopyFromEarlyReply(t *testing.T) {
	w := newWorld(t, 0)
	f, want := fileOf(t, 1<<20)
	err := w.copyFrom(f, 0, 1<<20, 0, 0)
	b := make([]byte, nbdwire.RequestSize)
	if _, err := io.ReadFull(w.peer.nc, b); err != nil {
		t.Fatal(err)
	}
	var q nbdwire.Request
	if err := q.Parse(b); err != nil {
		t.Fatal(err)
	}
	w.peer.send(done(q))
	c := w.conn()
	answered := func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.slots[0].answered
	}
	for end := time.Now().Add(patience); !answered(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatal("the answer is not read")
		}
	}
	select {
	case err := <-err:
		t.Fatalf("the copy is over while the server has not taken it: %v", err)
	default:
	}
	got := make([]byte, 1<<20)
	if _, err := io.ReadFull(w.peer.nc, got); err != nil || !bytes.Equal(got, want) {
		t.Error("other bytes than those of the file", err)
	}
	if err := within(t, "the end of the copy", err); err != nil {
		t.Error(err)
	}
}

// A connection that is lost in the middle of the bytes: all of them are sent again by the next one,
// and without a next one the copy fails.
func TestCopyFromCut(t *testing.T) {
	for _, delay := range []time.Duration{0, time.Minute} {
		w := newWorld(t, delay)
		f, want := fileOf(t, 1<<20)
		err := w.copyFrom(f, 0, 1<<20, 0, 0)
		if _, err := io.ReadFull(w.peer.nc, make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		w.peer.nc.Close()
		if delay == 0 {
			if err := within(t, "the end of the copy", err); !errors.Is(err, syscall.EIO) {
				t.Error(err)
			}
			continue
		}
		p := w.comeBack()
		q, got := p.next()
		if q.Off != 0 || !bytes.Equal(got, want) {
			t.Error("other bytes than those of the file")
		}
		p.send(done(q))
		if err := within(t, "the end of the copy", err); err != nil {
			t.Error(err)
		}
	}
}

// An error of the server is that of the copy.
func TestCopyFromError(t *testing.T) {
	w := newWorld(t, 0)
	f, _ := fileOf(t, 64<<10)
	err := w.copyFrom(f, 0, 64<<10, 0, 0)
	q, _ := w.peer.next()
	w.peer.send(nbdwire.Structured.AppendError(nil, &q, nbdwire.ENOSPC, ""))
	if err := within(t, "the end of the copy", err); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
}
