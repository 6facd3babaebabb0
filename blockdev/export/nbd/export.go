package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync"

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
	// Workers is the group that serves requests which have to wait, asked for each of them; nil, as its result,
	// means that there is no bound but that of each connection.
	Workers func() Workers
}

// Bitmap is a dirty bitmap that clients can read.
type Bitmap struct {
	Name string
	Bits interface {
		// NextDirty is the first dirty run in [off, end), in bytes.
		NextDirty(off, end int64) (at, n int64, ok bool)
	}
}

// Workers is a bounded group of workers that exports share.
type Workers interface {
	// Enter waits for a free worker, no longer than ctx.
	Enter(ctx context.Context) error
	// Leave gives it back.
	Leave()
}

// Export is a device that clients can ask for by name.
type Export struct {
	spec  Spec
	flags uint16 // transmission flags but FlagDF

	srv *Server

	mu sync.Mutex
	// in transmission
	clients map[*conn]struct{} // +checklocks:mu
	closing bool               // +checklocks:mu
	done    chan struct{}      // closed when closing and clients is empty
	// closed when a client goes; nil while nobody waits for that
	left chan struct{} // +checklocks:mu
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

// errClosing: the export is being removed.
var errClosing = errors.New("export is shutting down")

// attach makes c a client.
func (e *Export) attach(c *conn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return errClosing
	}
	e.clients[c] = struct{}{}
	return nil
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

// InUse tells whether clients are connected to the export.
func (e *Export) InUse() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.clients) > 0
}

// AwaitHungUp waits, no longer than ctx, until the clients that have hung up are none any more: who has seen a client's program end
// may expect that it does not use the export.
func (e *Export) AwaitHungUp(ctx context.Context) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		hungUp := false
		for c := range e.clients {
			hungUp = hungUp || c.hungUp()
		}
		if !hungUp {
			return
		}
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
		if ctx.Err() != nil {
			return
		}
	}
}

// ShutdownIfIdle is Shutdown if no client is connected, else it does nothing and returns false.
func (e *Export) ShutdownIfIdle() bool {
	e.mu.Lock()
	idle := len(e.clients) == 0
	if idle && !e.closing {
		e.closing = true
		close(e.done)
	}
	e.mu.Unlock()
	if idle {
		e.srv.forget(e)
	}
	return idle
}

// Shutdown takes the export off the list and drops its clients: their sockets are shut
// down at once, their requests end in their own time. It does not wait; Done tells the end.
// Doing it twice is harmless.
func (e *Export) Shutdown() {
	e.srv.forget(e)
	e.mu.Lock()
	defer e.mu.Unlock()
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

// Done is closed when the export was shut down and its last request has ended.
func (e *Export) Done() <-chan struct{} { return e.done }
