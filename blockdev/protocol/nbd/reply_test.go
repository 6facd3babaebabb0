package nbd

import (
	"bytes"
	"slices"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// Answers to a read of [4096, +4096) that break the protocol: the node gets EIO, for good.
func TestBreaches(t *testing.T) {
	be32 := func(v uint32) []byte { return put64(uint64(v))[4:] }
	type request = nbdwire.Request
	chunk := func(flags, typ uint16, cookie uint64, parts ...[]byte) []byte {
		p := slices.Concat(parts...)
		return append(nbdwire.Structured.AppendChunk(nil, flags, typ, &nbdwire.Request{Cookie: cookie}, len(p)), p...)
	}
	full := make([]byte, 4096)
	for what, answer := range map[string]func(q request) []byte{
		"magic":          func(request) []byte { return make([]byte, 32) },
		"another cookie": func(q request) []byte { q.Cookie += maxInFlight; return data(q, 1) },
		"another slot":   func(q request) []byte { q.Cookie++; return data(q, 1) },
		"simple":         func(q request) []byte { return append(nbdwire.AppendSimple(nil, q.Cookie, 0), full...) },
		"too long":       func(q request) []byte { return chunk(1, 1, q.Cookie, put64(q.Off), full, full[:1]) },
		"endless":        func(q request) []byte { return nbdwire.Structured.AppendChunk(nil, 1, 1, &q, 0xffffffff)[:20] },
		"too short":      func(q request) []byte { return chunk(1, 1, q.Cookie, put64(q.Off), full[1:]) },
		"before":         func(q request) []byte { return chunk(1, 1, q.Cookie, put64(q.Off-1), full) },
		"behind":         func(q request) []byte { return chunk(1, 1, q.Cookie, put64(1<<63), full) },
		"twice": func(q request) []byte {
			return append(chunk(0, 1, q.Cookie, put64(q.Off), full), data(q, 1)...)
		},
		"no data":        func(q request) []byte { return chunk(1, 1, q.Cookie, put64(q.Off)) },
		"nothing":        done,
		"none, not done": func(q request) []byte { return chunk(0, 0, q.Cookie) },
		"none with data": func(q request) []byte { return chunk(1, 0, q.Cookie, full) },
		"hole too long":  func(q request) []byte { return nbdwire.Structured.AppendHole(nil, 1, &q, q.Off, 4097) },
		"empty hole":     func(q request) []byte { return nbdwire.Structured.AppendHole(nil, 0, &q, q.Off, 0) },
		"hole of 13":     func(q request) []byte { return chunk(1, 2, q.Cookie, full[:13]) },
		"status": func(q request) []byte {
			return nbdwire.Structured.AppendBlockStatus(nil, 1, &q, 7, []nbdwire.Extent{{N: 1}})
		},
		"unknown":         func(q request) []byte { return chunk(1, 77, q.Cookie) },
		"no error":        func(q request) []byte { return nbdwire.Structured.AppendError(nil, &q, 0, "") },
		"short error":     func(q request) []byte { return chunk(1, 0x8001, q.Cookie, full[:5]) },
		"long error":      func(q request) []byte { return chunk(1, 0x8001, q.Cookie, be32(5), full, full) },
		"lengths differ":  func(q request) []byte { return chunk(1, 0x8001, q.Cookie, be32(5), []byte{0, 9, 1}) },
		"no error offset": func(q request) []byte { return chunk(1, 0x8002, q.Cookie, be32(5), []byte{0, 0}) },
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
			if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO || len(w.tries) > 0 {
				t.Errorf("afterwards: %v, %d attempts", err, len(w.tries))
			}
		})
	}
}

// Errors of the server are those of the request, and nothing else suffers.
func TestErrors(t *testing.T) {
	w := newWorld(t, 0)
	for no, want := range map[uint32]error{
		nbdwire.ENOSPC: syscall.ENOSPC, nbdwire.EPERM: syscall.EPERM, 4711: syscall.EINVAL,
	} {
		for _, structured := range []bool{false, true} {
			c := make(chan error, 1)
			go func() { c <- w.WriteAt(bg, blk.Buf(make([]byte, 4096)), 0, 0) }()
			q, _ := w.peer.next()
			if structured {
				w.peer.send(nbdwire.Structured.AppendErrorOffset(nil, &q, no, 3, "text"))
			} else {
				w.peer.send(nbdwire.AppendSimple(nil, q.Cookie, no))
			}
			if err := within(t, "an error", c); err != want {
				t.Errorf("%d: %v", no, err)
			}
		}
	}
	w.becomes(connected)
}

// Chunks may come in any order, holes too.
func TestScattered(t *testing.T) {
	w := newWorld(t, 0)
	b := bytes.Repeat([]byte{0xEE}, 4096)
	c := make(chan error, 1)
	go func() { c <- w.ReadAt(bg, blk.Bufs([][]byte{b[:1000], b[1000:1001], b[1001:]}), 4096, 0) }()
	q, _ := w.peer.next()
	w.peer.send(piece(q, 0, 512, 1))
	w.peer.send(piece(q, 2048, 1024, 2))
	w.peer.send(nbdwire.Structured.AppendHole(nil, 0, &q, q.Off+3072, 1024))
	w.peer.send(piece(q, 1000, 48, 3))
	w.peer.send(piece(q, 512, 488, 4))
	w.peer.send(piece(q, 1048, 1000, 5))
	w.peer.send(done(q))
	if err := within(t, "an answer", c); err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{4}, 488), bytes.Repeat([]byte{3}, 48),
		bytes.Repeat([]byte{5}, 1000), bytes.Repeat([]byte{2}, 1024), make([]byte, 1024))
	if !bytes.Equal(b, want) {
		t.Error("wrong data")
	}
}

// Many requests are under way at once and answered in another order.
func TestMany(t *testing.T) {
	w := newWorld(t, 0)
	const n = 3 * maxInFlight
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			b := make([]byte, 512)
			if err := w.ReadAt(bg, blk.Buf(b), int64(i)*512, 0); err != nil || b[0] != byte(i) || b[511] != byte(i) {
				t.Errorf("%d: %v, %d", i, err, b[0])
			}
		})
	}
	for range 3 {
		var qs []nbdwire.Request
		for range maxInFlight {
			q, _ := w.peer.next()
			qs = append(qs, q)
		}
		for _, q := range slices.Backward(qs) {
			w.peer.send(data(q, byte(q.Off/512)))
		}
	}
	all.Wait()
}

// A write that is answered before it was taken keeps its buffer until the connection ends.
func TestEarlyAnswer(t *testing.T) {
	w := newWorld(t, 0)
	big := make([]byte, 8<<20) // more than sockets hold
	c := make(chan error, 1)
	go func() { c <- w.WriteAt(bg, blk.Buf(big), 0, 0) }()
	w.peer.send(done(nbdwire.Request{Cookie: maxInFlight}))
	select {
	case err := <-c:
		if err != syscall.EIO { // it was not under way yet: a breach
			t.Fatalf("done before it was sent: %v", err)
		}
		return
	default:
	}
	w.peer.nc.Close()
	if err := within(t, "an error", c); err != syscall.EIO {
		t.Error(err)
	}
}

// What the block status says.
func TestStatus(t *testing.T) {
	w := newWorld(t, 0)
	for _, c := range []struct {
		x    nbdwire.Extent
		want blk.Extent
	}{
		{nbdwire.Extent{N: 4096}, blk.Extent{N: 4096, Data: true, OffValid: true, MapOff: 8192}},
		{nbdwire.Extent{N: 1 << 31, Flags: 3}, blk.Extent{N: 65536, Zero: true, OffValid: true, MapOff: 8192}},
		{nbdwire.Extent{N: 100, Flags: 1}, blk.Extent{N: 100, OffValid: true, MapOff: 8192}},
		{nbdwire.Extent{N: 512, Flags: 2}, blk.Extent{N: 512, Data: true, Zero: true, OffValid: true, MapOff: 8192}},
	} {
		type result struct {
			x   blk.Extent
			err error
		}
		got := make(chan result, 1)
		go func() {
			x, err := w.Status(bg, 8192, 65536)
			got <- result{x, err}
		}()
		q, _ := w.peer.next()
		if q.Cmd != nbdwire.CmdBlockStatus || q.Flags != nbdwire.CmdFlagReqOne || q.Off != 8192 || q.Len != 65536 {
			t.Errorf("%+v", q)
		}
		w.peer.send(nbdwire.Structured.AppendBlockStatus(nil, nbdwire.ChunkDone, &q, 7, []nbdwire.Extent{c.x, {N: 1}}))
		if r := within(t, "an answer", got); r.err != nil || r.x != c.want {
			t.Errorf("%+v: %+v, %v", c.x, r.x, r.err)
		}
	}
}

// Requests have the flags that were asked for.
func TestFlags(t *testing.T) {
	w := newWorld(t, 0)
	v := blk.Buf(make([]byte, 512))
	for _, c := range []struct {
		do        func() error
		cmd, flag uint16
	}{
		{func() error { return w.WriteAt(bg, v, 0, blk.FUA) }, nbdwire.CmdWrite, nbdwire.CmdFlagFUA},
		{func() error { return w.Zero(bg, 0, 512, blk.MayUnmap) }, nbdwire.CmdWriteZeroes, 0},
		{func() error { return w.Zero(bg, 0, 512, blk.FUA) },
			nbdwire.CmdWriteZeroes, nbdwire.CmdFlagNoHole | nbdwire.CmdFlagFUA},
		{func() error { return w.Zero(bg, 0, 512, blk.NoFallback|blk.MayUnmap) },
			nbdwire.CmdWriteZeroes, nbdwire.CmdFlagFastZero},
		{func() error { return w.Discard(bg, 0, 512) }, nbdwire.CmdTrim, 0},
		{func() error { return w.Flush(bg) }, nbdwire.CmdFlush, 0},
	} {
		got := make(chan error, 1)
		go func() { got <- c.do() }()
		q, _ := w.peer.next()
		if q.Cmd != c.cmd || q.Flags != c.flag {
			t.Errorf("%s: flags %#x, want %s with %#x", nbdwire.CmdName(q.Cmd), q.Flags, nbdwire.CmdName(c.cmd), c.flag)
		}
		w.peer.send(done(q))
		if err := within(t, "an answer", got); err != nil {
			t.Error(err)
		}
	}
}
