package chardev

import (
	"io"
	"os"
	"sync"

	"qblockd/events/panics"
)

// front is the side of a device that its user sees; every device has one.
type front struct {
	log *os.File // gets a copy of all output; nil: none

	mu      sync.Mutex
	handler Handler       // +checklocks:mu
	ready   chan struct{} // closed by attach
	ending  chan struct{} // closed by end
	ended   bool          // +checklocks:mu
	// of clients present
	streams map[io.Closer]struct{} // +checklocks:mu
	wait    panics.Group           // goroutines of the device
}

func newFront() *front {
	return &front{ready: make(chan struct{}), ending: make(chan struct{}), streams: make(map[io.Closer]struct{})}
}

func (f *front) attach(h Handler) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handler = h
	close(f.ready)
}

func (f *front) attached() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.handler != nil
}

// spawn runs g on a goroutine that end waits for. After end it does not, and returns false.
func (f *front) spawn(g func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return false
	}
	f.wait.Go("character device", g)
	return true
}

// serve hands a client to the user, as soon as there is one, and returns when the user is done
// with it or the device ends. c is closed then.
func (f *front) serve(c io.ReadWriteCloser) { f.serveTo(c, nil) }

// serveTo is serve for a given user; nil: the one that attach brings.
func (f *front) serveTo(c io.ReadWriteCloser, h Handler) {
	defer c.Close()
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		return
	}
	f.streams[c] = struct{}{}
	f.mu.Unlock()
	defer func(c io.Closer) {
		f.mu.Lock()
		delete(f.streams, c)
		f.mu.Unlock()
	}(c)
	if h == nil {
		select {
		case <-f.ending:
			return
		case <-f.ready:
		}
		f.mu.Lock()
		h = f.handler
		f.mu.Unlock()
	}
	if f.log != nil {
		c = &loggedStream{c, f.log}
	}
	h(c)
}

// end closes the streams of all clients and waits for the device's goroutines. Only the first
// call does something; the device has seen to it that they have no reason to stay.
func (f *front) end() {
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		return
	}
	f.ended = true
	close(f.ending)
	for c := range f.streams {
		c.Close()
	}
	f.mu.Unlock()
	f.wait.Wait()
	if f.log != nil {
		f.log.Close()
	}
}

// loggedStream copies what is written to a file. A log that cannot be written is no reason to
// disturb the client.
type loggedStream struct {
	io.ReadWriteCloser
	log *os.File
}

func (s *loggedStream) Write(b []byte) (int, error) {
	n, err := s.ReadWriteCloser.Write(b)
	if n > 0 {
		_, _ = s.log.Write(b[:n])
	}
	return n, err
}

// Lingers passes the question on.
func (s *loggedStream) Lingers() bool {
	l, ok := s.ReadWriteCloser.(interface{ Lingers() bool })
	return ok && l.Lingers()
}

// plain is a device without a state of its own.
type plain struct {
	*front
	name string // what filename shows
}

func (d *plain) filename() string { return d.name }
func (d *plain) close()           { d.end() }
