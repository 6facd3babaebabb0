package nbd

import (
	"context"
	"fmt"
	"sync"

	"qblockd/blockdev/export"
	"qblockd/blockdev/nbdwire"
)

// Spec describes an export.
type Spec struct {
	Name        string // what clients ask for; may be empty
	Description string // "": none
	// HasDescription tells an empty description from none.
	HasDescription bool
	Size           int64 // bytes; what clients see for as long as the export lives
	ReadOnly       bool
	// Writethrough: each write is on stable storage before it is acknowledged.
	Writethrough bool
	// AllocationDepth offers the context qemu:allocation-depth.
	AllocationDepth bool
	// Bitmaps are offered as contexts qemu:dirty-bitmap:NAME.
	Bitmaps []Bitmap
	Device  Device
	// Workers is the group that serves requests which have to wait, asked for each of them; nil, as
	// its result, means that there is no bound but that of each connection.
	Workers func() export.Workers
	// Errors is what to do about errors of the device; nil: clients get them.
	Errors *export.Errors
}

// Bitmap is a dirty bitmap that clients can read.
type Bitmap struct {
	Name string
	Bits interface {
		// NextDirty is the first dirty run in [off, end), in bytes.
		NextDirty(off, end int64) (at, n int64, ok bool)
	}
}

// Export is a device that clients can ask for by name.
type Export struct {
	spec     Spec
	flags    uint16 // transmission flags but FlagDF
	contexts []metaContext

	srv *Server

	mu sync.Mutex
	// in transmission
	clients map[*conn]struct{} // +checklocks:mu
	closing bool               // +checklocks:mu
	done    chan struct{}      // closed when closing and clients is empty
	// closed when a client goes; nil while nobody waits for that
	left chan struct{} // +checklocks:mu
}

// group is the group that serves requests which have to wait, to be asked for each of them; nil: no
// group.
func (x *Export) group() export.Workers {
	if x.spec.Workers == nil {
		return nil
	}
	return x.spec.Workers()
}

// checkSpec words what is wrong with the names of an export.
func checkSpec(s *Spec) error {
	if len(s.Name) > nbdwire.MaxString {
		return fmt.Errorf("export name '%s' too long", s.Name)
	}
	if len(s.Description) > nbdwire.MaxString {
		return fmt.Errorf("description '%s' too long", s.Description)
	}
	return nil
}

// transmissionFlags are what clients are told about an export.
func transmissionFlags(s *Spec, multiConn bool) uint16 {
	f := nbdwire.FlagHasFlags | nbdwire.FlagFlush | nbdwire.FlagFUA | nbdwire.FlagCache
	if multiConn {
		f |= nbdwire.FlagMultiConn
	}
	if s.ReadOnly {
		return f | nbdwire.FlagReadOnly
	}
	return f | nbdwire.FlagTrim | nbdwire.FlagWriteZeroes | nbdwire.FlagFastZero
}

// attach makes c a client, unless the export is being removed.
func (e *Export) attach(c *conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closing {
		e.clients[c] = struct{}{}
	}
	return !e.closing
}

// detach ends that, when c has no request left.
func (e *Export) detach(c *conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.clients, c)
	if e.left != nil {
		close(e.left)
		e.left = nil
	}
	if e.closing && len(e.clients) == 0 {
		close(e.done)
	}
}

// ShutdownIfIdle implements export.Server: who has seen a client's program end may expect that it
// does not use the export.
func (e *Export) ShutdownIfIdle(ctx context.Context) bool {
	e.mu.Lock()
	for e.hungUpLocked() && ctx.Err() == nil {
		if e.left == nil {
			e.left = make(chan struct{})
		}
		left := e.left
		e.mu.Unlock()
		select {
		case <-left:
		case <-ctx.Done():
		}
		e.mu.Lock()
	}
	idle := len(e.clients) == 0
	if idle {
		e.shutdownLocked()
	}
	e.mu.Unlock()
	if idle {
		e.srv.forget(e)
	}
	return idle
}

// hungUpLocked tells whether a client has hung up and is not gone yet.
// +checklocks:e.mu
func (e *Export) hungUpLocked() bool {
	for c := range e.clients {
		if c.hungUp() {
			return true
		}
	}
	return false
}

// Shutdown implements export.Server. It takes the export off the server's list and shuts down its
// clients' sockets.
func (e *Export) Shutdown() {
	e.srv.forget(e)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.shutdownLocked()
}

// +checklocks:e.mu
func (e *Export) shutdownLocked() {
	if e.closing {
		return
	}
	e.closing = true
	for c := range e.clients {
		c.kill()
	}
	if len(e.clients) == 0 {
		close(e.done)
	}
}

// Done implements export.Server.
func (e *Export) Done() <-chan struct{} { return e.done }
