package nbd

import (
	"io"
	"net"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// scripted is a connection to a server that says what it reads from Reader, whatever it is told.
type scripted struct{ io.Reader }

func (*scripted) Write(b []byte) (int, error)      { return len(b), nil }
func (*scripted) Close() error                     { return nil }
func (*scripted) LocalAddr() net.Addr              { return nil }
func (*scripted) RemoteAddr() net.Addr             { return nil }
func (*scripted) SetDeadline(time.Time) error      { return nil }
func (*scripted) SetReadDeadline(time.Time) error  { return nil }
func (*scripted) SetWriteDeadline(time.Time) error { return nil }

func (s *slot) setBuffer(b []byte) { s.in = blk.Buf(b) }

// A request allocates nothing.
func TestNoAllocations(t *testing.T) {
	w := newWorld(t, 0)
	go func() { // a server that reads and writes in one go
		b := make([]byte, nbdwire.RequestSize+4096)
		out := make([]byte, 0, 8192)
		var q nbdwire.Request
		for {
			if _, err := io.ReadFull(w.peer.nc, b[:nbdwire.RequestSize]); err != nil {
				return
			}
			if q.Parse(b) != nil {
				return
			}
			if q.Cmd == nbdwire.CmdWrite {
				if _, err := io.ReadFull(w.peer.nc, b[:q.Len]); err != nil {
					return
				}
				out = nbdwire.AppendSimple(out[:0], q.Cookie, 0)
			} else {
				out = nbdwire.Structured.AppendDataHead(out[:0], nbdwire.ChunkDone, &q, q.Off, int(q.Len))
				out = out[:len(out)+int(q.Len)]
			}
			if _, err := w.peer.nc.Write(out); err != nil {
				return
			}
		}
	}()
	v := blk.Buf(make([]byte, 4096))
	if n := testing.AllocsPerRun(200, func() {
		if err := w.ReadAt(bg, v, 4096, 0); err != nil {
			t.Error(err)
		}
		if err := w.WriteAt(bg, v, 8192, 0); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
