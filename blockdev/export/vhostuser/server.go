package vhostuser

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"qblockd/blockdev/export"
	"qblockd/events/panics"
	"qblockd/qmp/chardev/sockets"
)

// server is an export: its socket and the front end that uses it, if there is one. Others wait in
// the socket's backlog.
type server struct {
	device
	l    net.Listener
	log  *slog.Logger
	done chan struct{}

	// ctx is done from Shutdown on.
	ctx    context.Context
	cancel context.CancelFunc

	mu sync.Mutex
	// nil: there is none
	front *front // +checklocks:mu
	// Shutdown was called
	closing bool // +checklocks:mu
}

var _ export.Server = (*server)(nil)

func newServer(x *export.Export, l net.Listener, log *slog.Logger) *server {
	s := &server{l: l, log: log.With("export", x.Options.ID), done: make(chan struct{})}
	s.device.init(x)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	panics.Go("a vhost-user export", s.run, nil)
	return s
}

// run serves one front end after the other.
func (s *server) run() {
	defer close(s.done)
	var trouble sockets.Trouble
	for {
		nc, err := s.l.Accept()
		switch {
		case s.ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return
		case err != nil:
			pause := time.NewTimer(trouble.Failed(s.log, "vhost-user front end could not be accepted", err))
			select {
			case <-pause.C:
			case <-s.ctx.Done():
			}
			pause.Stop()
			continue
		}
		trouble.Over()
		u, ok := nc.(*net.UnixConn)
		if !ok { // a TCP socket that was inherited
			nc.Close()
			continue
		}
		s.serve(u)
	}
}

// serve serves a front end until it has gone and its requests have ended.
func (s *server) serve(nc *net.UnixConn) {
	f := newFront(s, nc)
	defer f.end()
	if !s.attach(f) {
		return
	}
	defer s.attach(nil)
	f.run()
}

// attach makes f the front end, unless the export is being removed.
func (s *server) attach(f *front) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.front = f
	return !s.closing
}

// Shutdown implements export.Server.
func (s *server) Shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return
	}
	s.closing = true
	s.cancel()
	s.l.Close()
	if s.front != nil {
		s.front.kill()
	}
}

// ShutdownIfIdle implements export.Server. A front end is no client that keeps an export, as in
// QEMU: it is there for as long as its machine.
func (s *server) ShutdownIfIdle(context.Context) bool {
	s.Shutdown()
	return true
}

// Done implements export.Server.
func (s *server) Done() <-chan struct{} { return s.done }
