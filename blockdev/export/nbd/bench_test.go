package nbd

import (
	"fmt"
	"io"
	"testing"

	"qblockd/blockdev/nbdwire"
)

// BenchmarkServer is one connection with a queue of requests over a memory file: what the
// server costs without a graph. Client and server share the machine.
func BenchmarkServer(b *testing.B) {
	const size = 64 << 20
	d := newFileDevice(b, size)
	d.dataEnd.Store(size)
	_, _, path := server(b, d, Options{})
	fill := open(b, path, nbdwire.Structured)
	fill.do(wr(0, 32<<20), pattern(32<<20, 0)...)
	fill.do(wr(32<<20, 32<<20), pattern(32<<20, 0)...)
	for _, x := range []struct {
		cmd   uint16
		n, qd int
	}{
		{nbdwire.CmdRead, 4096, 1}, {nbdwire.CmdRead, 4096, 16}, {nbdwire.CmdRead, 4096, 64},
		{nbdwire.CmdRead, 64 << 10, 16}, {nbdwire.CmdRead, 1 << 20, 8},
		{nbdwire.CmdWrite, 4096, 16}, {nbdwire.CmdWrite, 1 << 20, 8},
	} {
		b.Run(fmt.Sprintf("%s-%dk-qd%d", nbdwire.CmdName(x.cmd), x.n>>10, x.qd), func(b *testing.B) {
			c := open(b, path, nbdwire.Structured)
			c.nc.SetDeadline(noDeadline)
			b.SetBytes(int64(x.n))
			b.ReportAllocs()
			b.ResetTimer()
			sent := make(chan struct{}, x.qd)
			go func() {
				var out []byte
				for i := range b.N {
					sent <- struct{}{}
					q := req(x.cmd, uint64(i*x.n%size), uint32(x.n), nil)
					out = q.Append(out[:0])
					if x.cmd == nbdwire.CmdWrite {
						out = append(out, make([]byte, x.n)...)
					}
					c.nc.Write(out)
				}
			}()
			h := make([]byte, nbdwire.ChunkSize)
			for range b.N {
				for done := false; !done; {
					io.ReadFull(c.r, h[:nbdwire.SimpleSize])
					var p nbdwire.Reply
					if n, _ := p.ParseReply(h[:nbdwire.SimpleSize]); n == 0 {
						io.ReadFull(c.r, h[nbdwire.SimpleSize:])
						p.ParseReply(h)
						c.r.Discard(int(p.Len))
					}
					done = p.Done()
				}
				<-sent
			}
		})
	}
}
