package fuse

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/export"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/schema/types"
)

const (
	pageSize = 4096
	// maxData is the most that one request reads or writes, in bytes.
	maxData = 1 << 20
	// maxReaders is how many requests of an export are under way at most; the others wait in the
	// kernel.
	maxReaders = 64
	// background is how many requests that nobody waits for (reading ahead, asynchronous direct I/O)
	// the kernel sends before it waits for replies.
	background = 128
)

// server serves one export to the kernel.
type server struct {
	export   *export.Export
	root     *graph.Root
	writable bool
	growable bool
	shared   bool // other users may look at the file
	dev      int  // the connection to the kernel
	log      *slog.Logger
	unmount  func() error // ends the connection

	ctx    context.Context // of requests that wait; done from Shutdown on
	cancel context.CancelFunc
	done   chan struct{} // closed when use is over and the mount has gone

	// use is the number of requests in the device, and useOver from Shutdown on.
	use     atomic.Int64
	over    atomic.Bool  // the last one has ended
	idle    atomic.Int32 // readers that wait for requests
	running atomic.Int32 // goroutines that use the connection: readers, and tellSizes

	mu         sync.Mutex
	mode       uint32 // +checklocks:mu
	uid        uint32 // +checklocks:mu
	gid        uint32 // +checklocks:mu
	unmounting bool   // +checklocks:mu
	// ends counts what done waits for: the requests and the mount.
	ends int // +checklocks:mu
}

const useOver = 1 << 40

// spareReaders is how many readers wait for requests at least, if they have nothing to do.
const spareReaders = 2

// serve starts serving x by m.
func (t *Type) serve(x *export.Export, m *mount, shared bool) *server {
	mode := uint32(unix.S_IFREG | 0o400)
	if x.Writable() {
		mode |= 0o200
	}
	s := &server{
		export: x, root: x.Root, writable: x.Writable(), shared: shared, dev: m.dev, log: t.log,
		growable: types.Or(x.Options.U.(*types.BlockExportOptionsFuse).Growable, false),
		unmount: func() error {
			defer t.release(m.path)
			return m.unmount()
		},
		done: make(chan struct{}),
		mode: mode, uid: uint32(os.Getuid()), gid: uint32(os.Getgid()),
		ends: 2,
	}
	s.start()
	return s
}

// start starts the goroutines.
func (s *server) start() {
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.running.Store(spareReaders + 1) // and tellSizes
	for range spareReaders {
		s.goRead()
	}
	panics.Go("news of a FUSE export's size", func() {
		defer s.connectionLeft()
		s.tellSizes()
	}, nil)
}

// enter begins a request that the export lives for; false: it is being removed.
func (s *server) enter() bool {
	if s.use.Add(1) < useOver {
		return true
	}
	s.leave()
	return false
}

// leave ends it.
func (s *server) leave() {
	if s.use.Add(-1) == useOver && s.over.CompareAndSwap(false, true) {
		s.ended()
	}
}

// ended tells that the last request has ended, or that the mount has gone.
func (s *server) ended() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ends--; s.ends == 0 {
		close(s.done)
	}
}

// Shutdown implements export.Server. It unmounts, which fails the requests of clients.
func (s *server) Shutdown() {
	s.mu.Lock()
	again := s.unmounting
	s.unmounting = true
	s.mu.Unlock()
	if again {
		return
	}
	s.cancel()
	panics.Go("an unmount", func() {
		if err := s.unmount(); err != nil {
			s.log.Warn("FUSE export could not be unmounted", "export", s.export.Options.ID, "err", err)
		}
		s.ended()
	}, func(error) { s.ended() })
	// One more, so that the last one is seen here if there is none.
	s.use.Add(useOver + 1)
	s.leave()
}

// ShutdownIfIdle implements export.Server. A program that has the file open does not use it, as in
// QEMU: it may be a shell.
func (s *server) ShutdownIfIdle(context.Context) bool {
	s.Shutdown()
	return true
}

// Done implements export.Server.
func (s *server) Done() <-chan struct{} { return s.done }

// tellSizes lets the kernel ask for the attributes again when the size has changed. It ends with
// the export; then the connection is nobody's to write to.
func (s *server) tellSizes() {
	b := make([]byte, 0, outHeaderSize+24)
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.export.Resized():
		}
		if !s.enter() {
			return
		}
		// Fails, which is no harm, when the kernel knows nothing of the file yet.
		_, _ = unix.Write(s.dev, appendInvalidate(b))
		s.leave()
	}
}

// moreReaders starts a reader if nobody waits for requests, and there may be one more. The caller
// is a reader.
func (s *server) moreReaders() {
	if s.idle.Load() > 0 {
		return
	}
	if s.running.Add(1) > maxReaders+1 {
		s.running.Add(-1)
		return
	}
	s.goRead()
}

func (s *server) goRead() {
	s.idle.Add(1)
	panics.Go("a reader of FUSE requests", func() {
		defer s.connectionLeft()
		r := newReader(s)
		defer r.end()
		r.run()
	}, nil)
}

// connectionLeft tells that a goroutine that uses the connection has ended; the last one closes it.
func (s *server) connectionLeft() {
	if s.running.Add(-1) == 0 {
		unix.Close(s.dev)
	}
}
