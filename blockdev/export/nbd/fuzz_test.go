package nbd

import (
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/qmp/chardev/sockets"
)

// FuzzServer: whatever a client sends, the server neither crashes nor hangs nor keeps anything
// of it. The first bytes are sent as they are; if they do not lead into transmission, the rest is
// option data, else requests.
func FuzzServer(f *testing.F) {
	queries := nbdwire.AppendMetaQueries(nil, "x", "base:allocation", "qemu:allocation-depth")
	start := cat([]byte{0, 0, 0, 3}, opt(nbdwire.OptStructuredReply), opt(nbdwire.OptSetMetaContext, queries...))
	f.Add([]byte{})
	f.Add(cat([]byte{0, 0, 0, 3}, opt(nbdwire.OptList), opt(nbdwire.OptInfo, name("x", 1, 2, 3)...), opt(nbdwire.OptAbort)))
	compact := cat(start, opt(nbdwire.OptGo, name("x")...))
	extended := cat([]byte{0, 0, 0, 3}, opt(nbdwire.OptExtendedHeaders), opt(nbdwire.OptSetMetaContext, queries...),
		opt(nbdwire.OptGo, name("x")...))
	some := nbdwire.AppendStatusPayload(nil, 1<<20, 0, 1)
	for cmd := range uint16(9) {
		q := nbdwire.Request{Cmd: cmd, Cookie: uint64(cmd), Off: 4096, Len: 70000}
		data := make([]byte, q.Len)
		if cmd != nbdwire.CmdWrite {
			data = nil
		}
		f.Add(cat(compact, q.Append(nil), data))
		x := nbdwire.Request{Cmd: cmd, Flags: nbdwire.CmdFlagPayload, Len: uint64(len(some))}
		long := nbdwire.Request{Cmd: cmd, Len: 1 << 40}
		f.Add(cat(extended, x.AppendExt(nil), some, q.AppendExt(nil), data, long.AppendExt(nil)))
	}
	d := newFileDevice(f, 1<<20)
	path := filepath.Join(f.TempDir(), "s")
	l, _, err := sockets.ListenUnix(sockets.UnixAddr{Path: path})
	if err != nil {
		f.Fatal(err)
	}
	s := Serve(l, Options{MaxConns: 4})
	f.Cleanup(func() { stop(f, s) })
	if _, err := s.Add(Spec{Name: "x", Size: d.size, Device: d, AllocationDepth: true}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(patience))
		go func() {
			nc.Write(b)
			nc.(*net.UnixConn).CloseWrite()
		}()
		buf := make([]byte, 64<<10)
		for {
			_, err := nc.Read(buf)
			if e, ok := err.(net.Error); ok && e.Timeout() {
				t.Fatal("the server neither answers nor hangs up")
			}
			if err != nil {
				break
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 2*DefaultInflightBytes+16<<20 {
			t.Errorf("%d bytes allocated for %d bytes of input", n, len(b))
		}
		eventually(t, "nothing is left", func() bool { return d.inside.Load() == 0 && d.leases.Load() == 0 })
	})
}
