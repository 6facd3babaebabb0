package nbd

import (
	"bytes"
	"io"
	"slices"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// newExtendedWorld is a world with a server of 1 TiB that has extended headers.
func newExtendedWorld(t testing.TB, delay time.Duration) *world {
	return newWorldOf(t, delay, func(e *export) { e.extended, e.size = true, 1<<40 })
}

// nextExt is next with extended headers.
func (p *peer) nextExt() (q nbdwire.Request, data []byte) {
	p.t.Helper()
	_ = p.nc.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, nbdwire.ExtRequestSize)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatal(err)
	}
	if err := q.ParseExt(b); err != nil {
		p.t.Fatal(err)
	}
	if q.Flags&nbdwire.CmdFlagPayload != 0 {
		data = make([]byte, q.Len)
		if _, err := io.ReadFull(p.nc, data); err != nil {
			p.t.Fatal(err)
		}
	}
	return q, data
}

func extChunk(q nbdwire.Request, flags, typ uint16, parts ...[]byte) []byte {
	p := slices.Concat(parts...)
	return append(nbdwire.Extended.AppendChunk(nil, flags, typ, &q, len(p)), p...)
}

// extData is a whole answer to a read.
func extData(q nbdwire.Request, c byte) []byte {
	return extChunk(q, nbdwire.ChunkDone, nbdwire.ChunkOffsetData, put64(q.Off), bytes.Repeat([]byte{c}, int(q.Len)))
}

// With extended headers data have the flag of a payload, and what has none is one request however
// long it is.
func TestExtended(t *testing.T) {
	w := newExtendedWorld(t, 0)
	const long = 300 << 30
	b := make([]byte, 4096)
	v := blk.Buf(b)
	var x blk.Extent
	status := func() (err error) { x, err = w.Status(bg, 4096, long); return err }
	ok := func(q nbdwire.Request) []byte { return extChunk(q, nbdwire.ChunkDone, nbdwire.ChunkNone) }
	for _, c := range []struct {
		do     func() error
		want   nbdwire.Request
		answer func(q nbdwire.Request) []byte
	}{
		{func() error { return w.ReadAt(bg, v, 4096, 0) }, nbdwire.Request{Cmd: nbdwire.CmdRead, Len: 4096},
			func(q nbdwire.Request) []byte { return extData(q, 7) }},
		{func() error { return w.WriteAt(bg, v, 4096, blk.FUA) },
			nbdwire.Request{Cmd: nbdwire.CmdWrite, Len: 4096, Flags: nbdwire.CmdFlagFUA | nbdwire.CmdFlagPayload}, ok},
		{func() error { return w.Zero(bg, 4096, long, blk.MayUnmap) },
			nbdwire.Request{Cmd: nbdwire.CmdWriteZeroes, Len: long}, ok},
		{func() error { return w.Discard(bg, 4096, long) }, nbdwire.Request{Cmd: nbdwire.CmdTrim, Len: long}, ok},
		{status, nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: long, Flags: nbdwire.CmdFlagReqOne},
			func(q nbdwire.Request) []byte {
				return nbdwire.Extended.AppendBlockStatus(nil, nbdwire.ChunkDone, &q, 7,
					[]nbdwire.Extent{{N: 1 << 37, Flags: 3}, {N: 4096}})
			}},
	} {
		got := make(chan error, 1)
		go func() { got <- c.do() }()
		q, payload := w.peer.nextExt()
		c.want.Cookie, c.want.Off = q.Cookie, 4096
		if q != c.want {
			t.Errorf("%+v, want %+v", q, c.want)
		}
		if q.Cmd == nbdwire.CmdWrite && !bytes.Equal(payload, bytes.Repeat([]byte{7}, 4096)) {
			t.Error("wrong data")
		}
		w.peer.send(c.answer(q))
		if err := within(t, "an answer", got); err != nil {
			t.Errorf("%s: %v", nbdwire.CmdName(q.Cmd), err)
		}
	}
	if want := (blk.Extent{N: 1 << 37, Zero: true, OffValid: true, MapOff: 4096}); x != want {
		t.Errorf("the status is %+v", x)
	}
	if l := w.Caps().Limits; l.MaxZero != 0 || l.MaxDiscard != 0 || l.MaxTransfer != nbdwire.MaxPayload {
		t.Errorf("%+v", l)
	}
	got := w.read(bg, b)
	q, _ := w.peer.nextExt()
	w.peer.send(extChunk(q, nbdwire.ChunkDone, nbdwire.ChunkError, []byte{0, 0, 0, 28, 0, 0}))
	if err := within(t, "an error", got); err != syscall.ENOSPC {
		t.Error(err)
	}
	w.becomes(connected)
}

// Answers to a read of [4096, +4096) that break the protocol.
func TestExtendedBreaches(t *testing.T) {
	type request = nbdwire.Request
	full := make([]byte, 4096)
	for what, answer := range map[string]func(q request) []byte{
		"simple":     func(q request) []byte { return append(nbdwire.AppendSimple(nil, q.Cookie, 0), full...) },
		"structured": func(q request) []byte { return data(q, 1) },
		"offset":     func(q request) []byte { q.Off++; return extData(q, 1) },
		"endless": func(q request) []byte {
			return nbdwire.Extended.AppendChunk(nil, 1, nbdwire.ChunkOffsetData, &q, -1)
		},
		"4 GiB too long": func(q request) []byte {
			return append(nbdwire.Extended.AppendChunk(nil, 1, nbdwire.ChunkOffsetData, &q, 1<<32+8+4096),
				slices.Concat(put64(q.Off), full)...)
		},
		"error of 8 EiB": func(q request) []byte {
			return nbdwire.Extended.AppendChunk(nil, 1, nbdwire.ChunkError, &q, 1<<62)
		},
		"status": func(q request) []byte {
			return nbdwire.Extended.AppendBlockStatus(nil, 1, &q, 7, []nbdwire.Extent{{N: 1}})
		},
	} {
		t.Run(what, func(t *testing.T) {
			w := newExtendedWorld(t, 1000)
			got := w.read(bg, make([]byte, 4096))
			q, _ := w.peer.nextExt()
			w.peer.send(answer(q))
			if err := within(t, "an error", got); err != syscall.EIO {
				t.Error(err)
			}
			w.becomes(broken)
		})
	}
}

// So do answers to a question about the block status.
func TestExtendedStatusBreaches(t *testing.T) {
	chunk := nbdwire.Extended.AppendBlockStatus(nil, 1, &nbdwire.Request{}, 7, []nbdwire.Extent{{N: 512}})
	good := chunk[nbdwire.ExtChunkSize:]
	change := func(at int, c byte) []byte {
		b := slices.Clone(good)
		b[at] = c
		return b
	}
	for what, payload := range map[string][]byte{
		"another context": change(3, 8), "another count": change(7, 2), "no extent": good[:8], "cut": good[:20],
		"of nothing": change(14, 0), "much": make([]byte, maxStatus+1),
	} {
		t.Run(what, func(t *testing.T) {
			w := newExtendedWorld(t, 0)
			got := make(chan error, 1)
			go func() { _, err := w.Status(bg, 4096, 1<<33); got <- err }()
			q, _ := w.peer.nextExt()
			w.peer.send(extChunk(q, nbdwire.ChunkDone, nbdwire.ChunkBlockStatusExt, payload))
			if err := within(t, "an error", got); err != syscall.EIO {
				t.Error(err)
			}
			w.becomes(broken)
		})
	}
}

// A server that comes back without extended headers is not taken: requests may be too long for it.
func TestExtendedNoMore(t *testing.T) {
	w := newExtendedWorld(t, 0)
	w.back.extended = false
	w.peer.nc.Close()
	w.becomes(offline)
	if err := within(t, "an error", w.read(bg, make([]byte, 4096))); err != syscall.EIO {
		t.Error(err)
	}
	p := w.comeBack()
	_ = p.nc.SetReadDeadline(time.Now().Add(patience))
	if n, err := p.nc.Read(make([]byte, 100)); n > 0 || err != io.EOF {
		t.Errorf("%d bytes, %v", n, err)
	}
	w.becomes(offline)
}
