package nbd

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/schema/types"
)

// newWorldOfSeveral is newWorld with that many connections; the first is peers[0].
func newWorldOfSeveral(t *testing.T, n int, delay time.Duration) (w *world, peers []*peer) {
	t.Helper()
	w = newWorldWith(t, delay, func(e *export) { e.flags |= nbdwire.FlagMultiConn }, n)
	peers = []*peer{w.peer}
	for i := 1; i < n; i++ {
		peers = append(peers, w.comeBack())
		w.connections(i + 1)
	}
	return w, peers
}

// connections waits until so many are in use.
func (w *world) connections(n int) {
	w.t.Helper()
	for end := time.Now().Add(patience); ; runtime.Gosched() {
		w.link.mu.Lock()
		k := len(w.link.conns)
		w.link.mu.Unlock()
		if k == n {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("%d connections, want %d", k, n)
		}
	}
}

// start issues a read in the background, which peer p gets.
func (w *world) start(p *peer) (nbdwire.Request, <-chan error) {
	w.t.Helper()
	c := w.read(bg, make([]byte, 4096))
	q, _ := p.next()
	return q, c
}

// Requests go where the fewest are under way, and one flush is enough.
func TestSpread(t *testing.T) {
	w, peers := newWorldOfSeveral(t, 3, 0)
	var qs []nbdwire.Request
	var ends []<-chan error
	for _, i := range []int{0, 1, 2, 0, 1, 2} {
		q, end := w.start(peers[i])
		qs, ends = append(qs, q), append(ends, end)
	}
	peers[1].send(data(qs[1], 1))
	if err := within(t, "the end of a read", ends[1]); err != nil {
		t.Error(err)
	}
	flushed := make(chan error, 1)
	go func() { flushed <- w.Flush(bg) }()
	q, _ := peers[1].next()
	if q.Cmd != nbdwire.CmdFlush {
		t.Errorf("%v", q)
	}
	peers[1].send(done(q))
	if err := within(t, "the end of the flush", flushed); err != nil {
		t.Error(err)
	}
	for i, p := range []*peer{peers[0], nil, peers[2], peers[0], peers[1], peers[2]} {
		if p == nil {
			continue
		}
		p.send(data(qs[i], 1))
		if err := within(t, "the end of a read", ends[i]); err != nil {
			t.Error(err)
		}
	}
	select {
	case <-w.tries:
		t.Error("more connections than asked for")
	default:
	}
}

// A server that does not say that it takes several gets one. So does one whose next connection
// leads elsewhere, or that refuses it.
func TestOneOnly(t *testing.T) {
	w := newWorldWith(t, 0, func(*export) {}, 2)
	q, end := w.start(w.peer)
	w.peer.send(data(q, 1))
	if err := within(t, "the end of a read", end); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(e *export){
		"size": func(e *export) { e.size = 512 }, "one connection": func(e *export) { e.flags &^= nbdwire.FlagMultiConn },
		"read-only": func(e *export) { e.flags |= nbdwire.FlagReadOnly }, "refused": nil,
	} {
		w := newWorldWith(t, 0, func(e *export) { e.flags |= nbdwire.FlagMultiConn }, 3)
		if change == nil {
			w.refuse()
		} else {
			change(&w.back)
			p := w.comeBack()
			_ = p.nc.SetReadDeadline(time.Now().Add(patience))
			if _, err := p.nc.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("%s: the connection is not given up", what)
			}
		}
		q, end := w.start(w.peer)
		w.peer.send(data(q, 1))
		if err := within(t, "the end of a read", end); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		w.connections(1)
		if len(w.tries) > 0 {
			t.Errorf("%s: it is tried again", what)
		}
	}
}

// A further connection that has never answered is lost alone: its request is sent again by another
// one. With any other all are lost, and the requests of all are sent again by the next ones.
func TestLostOfSeveral(t *testing.T) {
	w, peers := newWorldOfSeveral(t, 2, 0)
	q0, end0 := w.start(peers[0])
	_, end1 := w.start(peers[1])
	peers[1].nc.Close()
	q1, _ := peers[0].next()
	for _, q := range []nbdwire.Request{q0, q1} {
		peers[0].send(data(q, 1))
	}
	for _, end := range []<-chan error{end0, end1} {
		if err := within(t, "the end of a read", end); err != nil {
			t.Error(err)
		}
	}
	w.connections(1)

	for first := range 2 {
		w, peers = newWorldOfSeveral(t, 2, time.Minute)
		answered := w.answer(peers[:2])
		_, end0 = w.start(peers[0])
		_, end1 = w.start(peers[1])
		peers[first].nc.Close()
		p := w.comeBack()
		w.refuse() // there is no other one this time
		qs := []nbdwire.Request{answered, answered}
		for i := range qs {
			qs[i], _ = p.next()
			p.send(data(qs[i], 1))
		}
		for _, end := range []<-chan error{end0, end1} {
			if err := within(t, "the end of a read", end); err != nil {
				t.Error(err)
			}
		}
		w.connections(1)
		if _, err := peers[1-first].nc.Read(make([]byte, 1)); err == nil {
			t.Error("the other connection goes on")
		}
	}
}

// answer has each of the peers answer a request.
func (w *world) answer(peers []*peer) (q nbdwire.Request) {
	w.t.Helper()
	qs, ends := make([]nbdwire.Request, len(peers)), make([]<-chan error, len(peers))
	for i, p := range peers {
		qs[i], ends[i] = w.start(p)
	}
	for i, p := range peers {
		p.send(data(qs[i], 1))
		if err := within(w.t, "the end of a read", ends[i]); err != nil {
			w.t.Error(err)
		}
	}
	return qs[0]
}

// Without a reconnect-delay what is under way on any of them fails when one is lost.
func TestLostOfSeveralFails(t *testing.T) {
	w, peers := newWorldOfSeveral(t, 3, 0)
	w.answer(peers)
	var ends []<-chan error
	for _, p := range peers {
		_, end := w.start(p)
		ends = append(ends, end)
	}
	peers[2].nc.Close()
	for _, end := range ends {
		if err := within(t, "the end of a read", end); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	}
	w.becomes(offline)
	w.connections(0)
}

// One that breaks the protocol breaks the node, also if it has never answered.
func TestBreachOfSeveral(t *testing.T) {
	w, peers := newWorldOfSeveral(t, 2, time.Minute)
	_, end0 := w.start(peers[0])
	_, end1 := w.start(peers[1])
	peers[1].send([]byte("this is no reply"))
	for _, end := range []<-chan error{end0, end1} {
		if err := within(t, "the end of a read", end); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	}
	w.becomes(broken)
	w.connections(0)
}

// A drain gives up each connection that is silent, and those that come while it lasts.
func TestDrainOfSeveral(t *testing.T) {
	w := newWorldWith(t, 0, func(e *export) { e.flags |= nbdwire.FlagMultiConn }, 2)
	_, end0 := w.start(w.peer)
	w.DrainBegin()
	p := w.comeBack()
	w.connections(2)
	_, end1 := w.start(p)
	for range 2 * int(silence/lookTime) {
		w.clock.Advance(lookTime)
	}
	for _, end := range []<-chan error{end0, end1} {
		if err := within(t, "the end of a read", end); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	}
	w.DrainEnd()
}

func TestCheckConnections(t *testing.T) {
	unix := types.SocketAddress{Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: "/s"}}
	fd := types.SocketAddress{Type: types.SocketAddressTypeFd, U: &types.String{Str: "3"}}
	for _, c := range []struct {
		n    uint32
		at   types.SocketAddress
		want string
	}{
		{0, unix, "x-qblockd-connections must be between 1 and 16"}, {17, unix, "x-qblockd-connections must be between 1 and 16"},
		{1, unix, ""}, {16, unix, ""}, {1, fd, ""}, {2, fd, "x-qblockd-connections: a descriptor is one connection"},
	} {
		got := ""
		if err := check(&types.BlockdevOptionsNbd{Server: c.at, XQblockdConnections: &c.n}); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%d connections to a %s: %q", c.n, c.at.Type, got)
		}
	}
	if !slices.Contains(Def.ForImages.Hints, "x-qblockd-connections") || strings.Contains(filename(
		&types.BlockdevOptionsNbd{Server: unix, XQblockdConnections: new(uint32(4))}), "connections") {
		t.Error("how many connections there are is part of what the node is")
	}
}
