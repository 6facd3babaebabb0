package nbd

import (
	"testing"

	"qblockd/blockdev/nbdwire"
	"qblockd/events/panics"
)

// A panic in a request, in line or in a worker, costs its client the connection; other clients are
// served, and the export can be taken back.
func TestRequestPanics(t *testing.T) {
	defer panics.Contain()()
	for _, worker := range []bool{false, true} {
		for _, q := range []nbdwire.Request{rd(0, 512), wr(0, 512), req(nbdwire.CmdFlush, 0, 0, nil),
			req(nbdwire.CmdTrim, 0, 512, nil), rd(0, 1<<20)} {
			d := newFileDevice(t, 4<<20)
			d.noMap = true
			d.wouldBlock.Store(worker)
			s, e, path := server(t, d, Options{})
			other, c := open(t, path, nbdwire.Structured), open(t, path, nbdwire.Structured)
			d.fault = func(string) error { panic("bug in the device") }
			c.put(q.Append(nil))
			if q.Cmd == nbdwire.CmdWrite {
				c.put(make([]byte, q.Len))
			}
			for {
				if _, err := c.r.ReadByte(); err != nil {
					break // the end, perhaps after an error reply
				}
			}
			eventually(t, "the unit of work to end", func() bool { return d.inside.Load() == 0 })
			d.fault = nil
			if a := other.do(rd(0, 4096)); a.errno != 0 {
				t.Errorf("another client: %+v", a)
			}
			eventually(t, "the connection to end", func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return len(s.conns) == 1
			})
			e.Shutdown()
			eventually(t, "the export to end", func() bool { return isDone(e) })
		}
	}
}
