package nbd

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

const huge = 8 << 40

// Requests without data may be longer than 4 GiB; what they do comes in pieces, each a unit of work
// of its own.
func TestLongRequests(t *testing.T) {
	d := newFileDevice(t, huge)
	var calls atomic.Int64
	d.fault = func(op string) error { calls.Add(1); return nil }
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Extended, nbdwire.ContextAllocation)
	const at = 5<<40 + 4096
	write := func() {
		t.Helper()
		if a := c.do(wr(at, 4096), pattern(4096, 1)...); a.errno != 0 {
			t.Fatalf("write: %d %s", a.errno, a.msg)
		}
	}
	const hz = nbdwire.StateHole | nbdwire.StateZero
	for _, cmd := range []uint16{nbdwire.CmdWriteZeroes, nbdwire.CmdTrim, nbdwire.CmdCache} {
		write()
		a := c.do(nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: huge})
		want := []nbdwire.Extent{{N: at, Flags: hz}, {N: 4096}, {N: huge - at - 4096, Flags: hz}}
		if got := a.extents[idAllocation]; !slices.Equal(got, want) {
			t.Fatalf("the status is %v, want %v; %d %s", got, want, a.errno, a.msg)
		}
		calls.Store(0)
		q := nbdwire.Request{Cmd: cmd, Len: 3<<40 + 777, Off: 4 << 40}
		if cmd == nbdwire.CmdCache {
			q.Len = 5<<30 + 777
		}
		if a := c.do(q); a.errno != 0 {
			t.Fatalf("%s: %d %s", nbdwire.CmdName(cmd), a.errno, a.msg)
		}
		if n := int64(q.Len/pieceMax(cmd)) + 1; calls.Load() != n {
			t.Errorf("%s: %d calls, want %d", nbdwire.CmdName(cmd), calls.Load(), n)
		}
		a = c.do(rd(at, 4096))
		if zero := blk.IsZero(a.data); a.errno != 0 || zero != (cmd != nbdwire.CmdCache) {
			t.Errorf("%s: error %d, zero %v", nbdwire.CmdName(cmd), a.errno, zero)
		}
	}
	if a := c.do(nbdwire.Request{Cmd: nbdwire.CmdTrim, Len: huge, Off: 1}); a.errno != nbdwire.EINVAL {
		t.Errorf("beyond the end: %d %s", a.errno, a.msg)
	}
	fast := nbdwire.Request{Cmd: nbdwire.CmdWriteZeroes, Flags: nbdwire.CmdFlagFastZero, Len: huge}
	if a := c.do(fast); a.errno != nbdwire.ENOTSUP {
		t.Errorf("fast zeroes: %d %s", a.errno, a.msg)
	}
}

// A drain waits for a piece, not for the request; a client that goes away ends it.
func TestLongRequestIsLeft(t *testing.T) {
	d := newFileDevice(t, huge)
	var calls atomic.Int64
	var reopen func()
	shut, gone := make(chan struct{}), make(chan struct{})
	d.fault = func(op string) error {
		switch calls.Add(1) {
		case 3:
			reopen = d.closeGate()
			close(shut)
		case 5:
			<-gone
		}
		return nil
	}
	s, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Extended)
	c.send(nbdwire.Request{Cmd: nbdwire.CmdWriteZeroes, Len: huge}, nil)
	<-shut
	eventually(t, "the request has left the device", func() bool { return d.inside.Load() == 0 })
	if n := calls.Load(); n != 3 {
		t.Errorf("%d pieces behind a closed gate", n)
	}
	reopen()
	eventually(t, "it goes on", func() bool { return calls.Load() == 5 })
	c.nc.Close()
	s.Close()
	close(gone)
	s.wg.Wait()
	if n := calls.Load(); n != 5 {
		t.Errorf("%d pieces for a client that has gone", n)
	}
}

// The contexts of a block status are those that the payload names, in the order of their ids.
func TestStatusPayload(t *testing.T) {
	bits := func(at, n int64) dirty { return dirty{at, n} }
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{}, func(s *Spec) {
		s.Bitmaps = []Bitmap{{"a", bits(0, 4096)}, {"b", bits(8192, 4096)}, {"c", bits(65536, 1)}}
	})
	c := open(t, path, nbdwire.Extended, nbdwire.ContextAllocation, nbdwire.ContextBitmap+"a", nbdwire.ContextBitmap+"c")
	if c.flag&nbdwire.FlagStatusPayload == 0 {
		t.Errorf("flags 0x%x", c.flag)
	}
	ask := func(n uint64, ids ...uint32) answer {
		b := nbdwire.AppendStatusPayload(nil, n, ids...)
		return c.do(nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: uint64(len(b))}, b...)
	}
	ids := func(a answer) (l []uint32) {
		for id := range a.extents {
			l = append(l, id)
		}
		slices.Sort(l)
		return l
	}
	const a, b, last = idBitmap, idBitmap + 1, idBitmap + 2
	for _, want := range [][]uint32{
		{idAllocation}, {a}, {last}, {idAllocation, last}, {a, last}, {idAllocation, a, last},
	} {
		asked := slices.Clone(want)
		slices.Reverse(asked)
		if got := ask(1<<20, asked...); got.errno != 0 || !slices.Equal(ids(got), want) {
			t.Errorf("%v: %d %s %v", want, got.errno, got.msg, got.extents)
		}
	}
	got := ask(4096+100, a)
	if want := []nbdwire.Extent{{N: 4096, Flags: nbdwire.StateDirty}, {N: 100}}; !slices.Equal(got.extents[a], want) {
		t.Errorf("%v, want %v", got.extents, want)
	}
	for _, bad := range [][]uint32{{}, {idDepth}, {b}, {a, a}, {a, b}, {idAllocation, a, last, last}, {99}} {
		if got := ask(1<<20, bad...); got.errno != nbdwire.EINVAL || got.msg != errContexts.Error() {
			t.Errorf("%v: %d %q %v", bad, got.errno, got.msg, got.extents)
		}
	}
	if got := c.do(nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: 1 << 20}); len(got.extents) != 3 {
		t.Errorf("without a payload: %d %s %v", got.errno, got.msg, got.extents)
	}
	// Without extended headers the flag is unknown, and no payload follows.
	c = open(t, path, nbdwire.Structured, nbdwire.ContextAllocation)
	q := nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: 12, Flags: nbdwire.CmdFlagPayload}
	if got := c.do(q); got.errno != nbdwire.EINVAL || c.flag&nbdwire.FlagStatusPayload != 0 {
		t.Errorf("structured: %d %s, flags 0x%x", got.errno, got.msg, c.flag)
	}
}

// dirty is a bitmap with one dirty run, of n bytes from at on.
type dirty struct{ at, n int64 }

// NextDirty implements the Bits of a Bitmap.
func (d dirty) NextDirty(off, end int64) (at, n int64, ok bool) {
	at, last := max(off, d.at), min(end, d.at+d.n)
	return at, last - at, at < last
}

// Payloads that come one byte at a time, between other requests.
func TestSlowPayloads(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Extended, nbdwire.ContextAllocation, nbdwire.ContextDepth)
	p := nbdwire.AppendStatusPayload(nil, 1<<20, idDepth)
	status := nbdwire.Request{
		Cmd: nbdwire.CmdBlockStatus, Cookie: 1, Flags: nbdwire.CmdFlagPayload, Len: uint64(len(p)),
	}
	trim := nbdwire.Request{Cmd: nbdwire.CmdTrim, Cookie: 2, Flags: nbdwire.CmdFlagPayload, Len: 5}
	read := nbdwire.Request{Cmd: nbdwire.CmdRead, Cookie: 3, Len: 512}
	in := slices.Concat(status.AppendExt(nil), p, trim.AppendExt(nil), []byte("12345"), read.AppendExt(nil))
	for i := range in {
		c.put(in[i : i+1])
		switch i {
		case nbdwire.ExtRequestSize + len(p) - 1:
			if a := c.reply(status); a.errno != 0 || len(a.extents) != 1 || a.extents[idDepth][0].N != 1<<20 {
				t.Errorf("status: %+v", a)
			}
		case 2*nbdwire.ExtRequestSize + len(p) + 5 - 1:
			if a := c.reply(trim); a.errno != nbdwire.EINVAL || !strings.Contains(a.msg, "unsupported flags") {
				t.Errorf("trim: %+v", a)
			}
		}
	}
	if a := c.reply(read); a.errno != 0 {
		t.Errorf("read: %+v", a)
	}
}

// Clients of newer makes, which speak extended headers.
func TestExtendedInterop(t *testing.T) {
	d := newFileDevice(t, huge)
	_, _, path := server(t, d, Options{})
	x := uri(path, "x")
	out := run(t, "nbdinfo13", x)
	for _, want := range []string{"using extended packets", "can_block_status_payload: true", "export-size: 8796093022208 (8T)"} {
		if !strings.Contains(out, want) {
			t.Errorf("nbdinfo: no %q in\n%s", want, out)
		}
	}
	c := open(t, path, nbdwire.Extended)
	c.do(wr(6<<40, 65536), pattern(65536, 1)...)
	want := fmt.Sprintf("0 %d 3 hole,zero %d 65536 0 data %d %d 3 hole,zero", int64(6<<40), int64(6<<40), int64(6<<40+65536),
		int64(2<<40-65536))
	if got := strings.Join(strings.Fields(run(t, "nbdinfo13", "--map", x)), " "); got != want {
		t.Errorf("nbdinfo --map: %s", got)
	}
	out = run(t, "qemu-io10", "-f", "raw", "-c", "write -P 7 7T 100k", "-c", "write -z -u 1T 1G", "-c", "discard 2T 1G", "-c", "flush",
		"-c", "read -P 7 7T 100k", "-c", "read -v 6T 16", x)
	if strings.Contains(out, "failed") || !strings.Contains(out, "60000000000:  01 08 0f 16") {
		t.Error(out)
	}
	out = run(t, "qemu-img10", "map", "-f", "raw", "--output=json", x)
	if n := strings.Count(out, `"data": true`); n != 2 || strings.Count(out, "\n") != 5 {
		t.Errorf("qemu-img map: %s", out)
	}
	if a := c.do(rd(7<<40, 102400)); !bytes.Equal(a.data, bytes.Repeat([]byte{7}, 102400)) {
		t.Error("what qemu-io has written differs")
	}
	// A server between, which is a client of ours.
	if _, err := exec.LookPath("nbdkit13"); err == nil {
		out = run(t, "nbdkit13", "-U", filepath.Join(t.TempDir(), "k"), "nbd", "socket="+path, "export=x", "--run", "nbdinfo13 --map \"$uri\"")
		if got := strings.Join(strings.Fields(out), " "); !strings.Contains(got, fmt.Sprintf("%d 65536 0 data", int64(6<<40))) {
			t.Errorf("through nbdkit: %s", got)
		}
	}
}

// A copy of an image to and from us by a newer nbdcopy, over several connections.
func TestExtendedCopy(t *testing.T) {
	const size = 64 << 20
	_, _, path := server(t, newFileDevice(t, size), Options{})
	_, _, to := server(t, newFileDevice(t, size), Options{})
	c, k := open(t, path, nbdwire.Extended), open(t, to, nbdwire.Extended)
	for off := int64(0); off < size; off += 3 << 20 {
		c.do(wr(uint64(off), 1<<20), pattern(1<<20, byte(off>>20))...)
		k.do(wr(uint64(off+5<<10), 4096), pattern(4096, 3)...) // to be zeroed
	}
	run(t, "nbdcopy13", uri(path, "x"), uri(to, "x"))
	for off := uint64(0); off < size; off += 16 << 20 {
		if a, b := c.do(rd(off, 16<<20)), k.do(rd(off, 16<<20)); a.errno|b.errno != 0 || !bytes.Equal(a.data, b.data) {
			t.Errorf("the copy differs at %d", off)
		}
	}
}
