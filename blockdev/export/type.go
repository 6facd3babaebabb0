package export

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Type is a way to show nodes to clients: one value of QAPI's BlockExportType. No method waits for
// clients.
type Type interface {
	// Check says what is wrong with an export of n as o asks for it, before anything is changed,
	// and which nodes beside n must hold still while it is made. It may be asked several times.
	Check(n *graph.Node, o *types.BlockExportOptions) (also []*graph.Node, err error)
	// Claim is what an export that o asks for needs of its node, and lets others do with it. need is
	// what all exports of that kind need.
	Claim(o *types.BlockExportOptions, need perm.Perm) perm.Claim
	// Serve lets clients use x; held are n and what Check named.
	Serve(x *Export, held *graph.Hold) (Server, error)
	// Close ends what the type has beside its exports, for the end of the daemon; Check and Serve
	// fail from then on.
	Close()
}

// Server serves one export to its clients.
type Server interface {
	// Shutdown drops the clients; requests in the device end in their own time. It does not wait;
	// Done tells the end. Doing it twice is harmless.
	Shutdown()
	// ShutdownIfIdle is Shutdown if no client uses the export, else it does nothing and returns
	// false. It waits for clients that have hung up to be gone, no longer than ctx.
	ShutdownIfIdle(ctx context.Context) bool
	// Done is closed when the export was shut down and its last request has ended.
	Done() <-chan struct{}
}

// Workers is a bounded group of workers that exports share (an iothread object).
type Workers interface {
	// Enter waits for a free worker, no longer than ctx.
	Enter(ctx context.Context) error
	// Leave gives it back.
	Leave()
}

// Export is one export. The exported part is for its Type, and constant from Serve on.
type Export struct {
	// Options are what makes the export again, defaults that depend on something filled in by
	// Type.Check. The node is the one that it was made on, see Table.Options.
	Options *types.BlockExportOptions
	// Root is where requests enter. It counts them.
	Root *graph.Root
	// Errors is what to do about errors of the node; nil: they are passed on.
	Errors *Errors

	// resized tells Server that the size may have changed; it has room for one.
	resized chan struct{}

	account graph.Account      // of Root
	cancel  context.CancelFunc // of the root's context: requests that wait for others give up
	bitmaps []*graph.DirtyBitmap
	// workers serve the requests that have to wait; it points to nil for no group.
	workers atomic.Pointer[Workers]

	server  Server        // guarded by Table.mu until it is on the list; nil while it is being made
	removed error         // guarded by Table.mu: why it was removed while being made
	closing bool          // guarded by Table.mu
	gone    chan struct{} // closed when the export is off the list and its event was sent
}

// Writable tells whether clients may write.
func (x *Export) Writable() bool { return types.Or(x.Options.Writable, false) }

// Size is that of the node at this time, in bytes.
func (x *Export) Size() int64 { return blk.AlignDown(x.Root.Size(), blk.SectorSize) }

// Resized receives when Size may be another one than before.
func (x *Export) Resized() <-chan struct{} { return x.resized }

// noteSize makes Resized receive; it does not wait.
func (x *Export) noteSize() {
	select {
	case x.resized <- struct{}{}:
	default:
	}
}

// Workers is the group that serves requests which have to wait, to be asked for each of them; nil:
// no group.
func (x *Export) Workers() Workers { return *x.workers.Load() }

// setWorkers makes w serve x from the next request on.
func (x *Export) setWorkers(w Workers) { x.workers.Store(&w) }

// tellError tells clients of QMP what was done about an error. An export has no path among QEMU's
// devices.
func (x *Export) tellError(op types.IoOperationType, a types.BlockErrorAction, err error) {
	e := types.BlockIoErrorEvent{
		Device: x.Options.ID, Operation: op, Action: a,
		Nospace: new(errors.Is(err, syscall.ENOSPC)), Reason: blk.ErrnoText(err),
	}
	if n := x.Root.Node(); n != nil {
		e.NodeName = new(n.Name())
	}
	x.Root.Graph().Sink().Emit(e)
}

// shutdown drops the clients of x; it does not wait.
func (x *Export) shutdown() {
	x.server.Shutdown()
	x.cancel()
}

// wait waits for x to be gone, no longer than ctx.
func (x *Export) wait(ctx context.Context) {
	select {
	case <-x.gone:
	case <-ctx.Done():
	}
}
