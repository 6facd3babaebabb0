package nbd

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/schema/types"
)

// prompt is what a command may take at most that must not wait for clients.
const prompt = 2 * time.Second

func promptly(t *testing.T, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if d := time.Since(start); d > prompt {
		t.Errorf("%s took %v", what, d)
	}
}

func isDone(e *Export) bool {
	select {
	case <-e.Done():
		return true
	default:
		return false
	}
}

func TestExportNames(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	s, e, path := server(t, d, Options{MaxConns: 1})
	if _, err := s.Add(Spec{Name: "x", Device: d}); err == nil || err.Error() != "NBD server already has export named 'x'" {
		t.Error(err)
	}
	long := strings.Repeat("n", 4097)
	if _, err := s.Add(Spec{Name: long, Device: d}); err == nil || err.Error() != "export name '"+long+"' too long" {
		t.Error(err)
	}
	if _, err := s.Add(Spec{Name: "y", Description: long, Device: d}); err == nil || err.Error() != "description '"+long+"' too long" {
		t.Error(err)
	}
	if e.flags&nbdwire.FlagMultiConn != 0 {
		t.Error("several connections are promised to be consistent where one is allowed")
	}
	e.Shutdown()
	e.Shutdown()
	if !isDone(e) {
		t.Error("an export without clients does not end")
	}
	c := dial(t, path)
	c.greet(3)
	r := c.option(nbdwire.OptInfo, (&nbdwire.InfoRequest{Name: "x"}).Append(nil))
	if r[0].Type != nbdwire.RepErrUnknown || string(r[0].data) != "export 'x' not present" {
		t.Errorf("%#x %s", r[0].Type, r[0].data)
	}
	if _, err := s.Add(Spec{Name: "x", Device: d}); err != nil {
		t.Error(err)
	}
}

func TestSafeRemoval(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, e, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	if e.ShutdownIfIdle(t.Context()) {
		t.Fatal("removed under a client")
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdDisc}
	c.put(q.Append(nil))
	c.eof()
	eventually(t, "the client is gone", func() bool { return e.ShutdownIfIdle(t.Context()) })
	if !e.ShutdownIfIdle(t.Context()) || !isDone(e) {
		t.Error("not removed")
	}
}

// A client whose request is stuck in the device is dropped at once; the export ends with the
// request.
func TestHardRemovalWithStuckRequest(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	d.noMap = true
	stuck, entered := make(chan struct{}), make(chan struct{}, 8)
	d.wouldBlock.Store(true)
	d.fault = func(op string) error {
		entered <- struct{}{}
		<-stuck
		return nil
	}
	s, e, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	q := rd(0, 4096)
	c.put(q.Append(nil))
	<-entered
	promptly(t, "Shutdown", e.Shutdown)
	c.eof()
	if isDone(e) {
		t.Error("the export is done while a request is in the device")
	}
	promptly(t, "Close", s.Close)
	close(stuck)
	<-e.Done()
}

// Requests of a drained export wait, and hold up neither other connections' handshakes nor removal.
func TestClosedGate(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, e, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	openGate := d.closeGate()
	qs := []nbdwire.Request{rd(0, 4096), rd(0, 1<<20), wr(0, 4), req(nbdwire.CmdFlush, 0, 0, nil)}
	for i := range qs {
		qs[i].Cookie = uint64(i)
		c.put(qs[i].Append(nil))
		if qs[i].Cmd == nbdwire.CmdWrite {
			c.put([]byte{1, 2, 3, 4})
		}
	}
	other := open(t, path, nbdwire.Structured)
	openGate()
	seen := map[uint64]bool{}
	for range qs {
		h := c.peekCookie()
		if a := c.reply(qs[h]); a.errno != 0 {
			t.Errorf("request %d: %d", h, a.errno)
		}
		seen[h] = true
	}
	if len(seen) != len(qs) {
		t.Errorf("answered: %v", seen)
	}
	d.closeGate()
	q := rd(0, 4096)
	other.put(q.Append(nil))
	e.Shutdown()
	select {
	case <-e.Done():
	case <-time.After(patience):
		t.Error("requests at the closed gate do not give up")
	}
}

// peekCookie tells which request the next reply is for.
func (c *client) peekCookie() uint64 {
	c.t.Helper()
	b, err := c.r.Peek(nbdwire.SimpleSize)
	if err != nil {
		c.t.Fatal(err)
	}
	var cookie uint64
	for _, x := range b[8:] {
		cookie = cookie<<8 | uint64(x)
	}
	return cookie
}

// A client that reads nothing holds no pass, bounded memory, and up nobody.
func TestClientThatNeverReads(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		d := newFileDevice(t, 64<<20)
		d.noMap = !mapped
		s, _, path := server(t, d, Options{})
		c := open(t, path, nbdwire.Structured)
		d.dataStart.Store(0)
		d.dataEnd.Store(64 << 20)
		var out []byte
		for range 4000 {
			q := rd(0, 1<<20)
			out = q.Append(out)
		}
		c.nc.Write(out)
		var cn *conn
		eventually(t, "the connection is there", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			for cn = range s.conns {
			}
			return cn != nil
		})
		c.r.Peek(1)
		eventually(t, "no pass is held", func() bool { return d.inside.Load() == 0 })
		w := &cn.workers
		w.mu.Lock()
		if w.bytes > DefaultInflightBytes || w.inflight > DefaultInflight {
			t.Errorf("%d requests with %d bytes are under way", w.inflight, w.bytes)
		}
		w.mu.Unlock()
		promptly(t, "Close", func() { stop(t, s) })
	}
}

// Many half-open connections: bounded, and no hindrance to stopping.
func TestHalfOpenHandshakes(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	s, _, path := server(t, d, Options{MaxConns: 100, Handshake: -1})
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range 1000 {
		nc, err := net.DialTimeout("unix", path, patience)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, nc)
	}
	eventually(t, "as many are served as may be", func() bool { return s.count() == 100 })
	// Who goes makes room.
	for _, nc := range conns[:500] {
		nc.Close()
	}
	eventually(t, "others get their turn", func() bool {
		conns[999].SetReadDeadline(time.Now().Add(time.Millisecond))
		if s.count() > 100 {
			t.Fatalf("%d connections", s.count())
		}
		for _, nc := range conns[500:600] {
			b := make([]byte, nbdwire.GreetingSize)
			nc.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := nc.Read(b); err == nil {
				return true
			}
		}
		return false
	})
	promptly(t, "Close", func() { stop(t, s) })
}

func (s *Server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

func TestHandshakeDeadline(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{Handshake: 50 * time.Millisecond})
	slow := dial(t, path)
	slow.take(nbdwire.GreetingSize)
	slow.eof()
	// The deadline ends with the handshake.
	c := open(t, path, nbdwire.Structured)
	time.Sleep(100 * time.Millisecond)
	if a := c.do(rd(0, 512)); a.errno != 0 {
		t.Error(a)
	}
}

func TestConnectionLimitCountsServedOnes(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{MaxConns: 1})
	for range 3 {
		c := open(t, path, nbdwire.Structured)
		c.do(rd(0, 512))
		c.nc.Close()
	}
}

func TestListenInet(t *testing.T) {
	ctx := t.Context()
	l, err := listenInet(ctx, &types.InetSocketAddress{Host: "127.0.0.1", Port: "0"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	is := func(want string, a types.InetSocketAddress) {
		t.Helper()
		l, err := listenInet(ctx, &a)
		if err == nil {
			l.Close()
		}
		if err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	yes, no := true, false
	is("Failed to find an available port: Address already in use", types.InetSocketAddress{Host: "127.0.0.1", Port: itoa(port)})
	is("Cannot disable IPv4 and IPv6 at same time", types.InetSocketAddress{Host: "127.0.0.1", Port: "0", Ipv4: &no, Ipv6: &no})
	is("address resolution failed for nowhere.invalid:0: Name or service not known",
		types.InetSocketAddress{Host: "nowhere.invalid", Port: "0", Numeric: &yes})
	is("address resolution failed for 127.0.0.1:no-such-service: Servname not supported for ai_socktype",
		types.InetSocketAddress{Host: "127.0.0.1", Port: "no-such-service"})
	to := uint16(min(port+20, 65535))
	l2, err := listenInet(ctx, &types.InetSocketAddress{Host: "127.0.0.1", Port: itoa(port), To: &to})
	if err != nil {
		t.Fatal(err)
	}
	defer l2.Close()

	d := newFileDevice(t, 1<<20)
	s := Serve(l2, Options{})
	defer stop(t, s)
	if _, err := s.Add(Spec{Name: "x", Size: d.size, Device: d}); err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", l2.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	b := make([]byte, nbdwire.GreetingSize)
	if _, err := nc.Read(b); err != nil {
		t.Error(err)
	}
}

// A host with several addresses is listened to on all of them.
func TestListenInetSeveralAddresses(t *testing.T) {
	var ls []net.Listener
	for range 2 {
		l, err := listenInet(t.Context(), &types.InetSocketAddress{Host: "127.0.0.1", Port: "0"})
		if err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
	}
	s := Serve(joinListeners(ls), Options{})
	for _, l := range ls {
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(patience))
		if _, err := nc.Read(make([]byte, nbdwire.GreetingSize)); err != nil {
			t.Error(err)
		}
		nc.Close()
	}
	stop(t, s)
	if _, err := net.Dial("tcp", ls[1].Addr().String()); err == nil {
		t.Error("still listening")
	}
}

func itoa(n int) string { return (&net.TCPAddr{Port: n}).String()[1:] }

// Everything at once: connections come, work and go while exports come and go.
func TestChurn(t *testing.T) {
	d := newFileDevice(t, 8<<20)
	s, _, path := server(t, d, Options{})
	var n atomic.Int64
	done := make(chan struct{})
	for i := range 4 {
		go func() {
			defer func() { done <- struct{}{} }()
			for k := range 15 {
				nc, err := net.Dial("unix", path)
				if err != nil {
					return
				}
				var out []byte
				out = append(out, 0, 0, 0, 3)
				out = nbdwire.AppendOption(out, nbdwire.OptStructuredReply, nil)
				out = nbdwire.AppendOption(out, nbdwire.OptGo, (&nbdwire.InfoRequest{Name: "x"}).Append(nil))
				for j := range 50 {
					q := rd(uint64(j)*4096, uint32(4096<<(j%8)))
					out = q.Append(out)
				}
				nc.Write(out)
				b := make([]byte, 1<<uint(10+(i+k)%10))
				nc.SetReadDeadline(time.Now().Add(patience))
				if m, _ := nc.Read(b); m > 0 {
					n.Add(1)
				}
				nc.Close()
			}
		}()
	}
	for range 20 {
		e, err := s.Add(Spec{Name: "y", Size: d.size, Device: d})
		if err != nil {
			t.Fatal(err)
		}
		e.Shutdown()
		<-e.Done()
	}
	for range 4 {
		<-done
	}
	if n.Load() == 0 {
		t.Error("nobody was served")
	}
	eventually(t, "all is quiet", func() bool { return d.inside.Load() == 0 && d.leases.Load() == 0 && s.count() == 0 })
}
