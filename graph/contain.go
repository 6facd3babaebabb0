package graph

import (
	"log/slog"
	"sync/atomic"
	"syscall"

	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// guard stands between a node and its driver: a panic in the driver becomes an EIO of what called
// it, and the node takes no more requests, as what the driver keeps in memory is in doubt.
type guard struct {
	n      *Node
	failed atomic.Bool // see Node.Fail
}

// errFailed is what requests to a node that has failed get.
var errFailed = blk.Text("The node is unusable after an internal error", syscall.EIO)

// usable is the error of a node that has failed.
func (g *guard) usable() error {
	if g.failed.Load() {
		return errFailed
	}
	return nil
}

// caught is deferred by each call of the driver.
func (g *guard) caught(err *error) {
	if !panics.Contained() {
		return
	}
	if p := recover(); p != nil {
		*err = panics.Report("driver '"+g.n.DriverName()+"' of node '"+g.n.name+"'", p)
		g.n.Fail(*err)
	}
}

// careful is Node.Guarded also for a node that has failed: for the end of a transaction, and for
// closing.
func (g *guard) careful(f func() error) (err error) {
	defer g.caught(&err)
	return f()
}

// Fail makes the node unusable: all requests fail with EIO from now on, and nothing that its driver
// has in memory is written any more. Queries, and taking it out of the graph, work as before. why
// is told to clients, once.
func (n *Node) Fail(why error) {
	if n.guard.failed.Swap(true) {
		return
	}
	slog.Error("a node has become unusable", "node", n.name, "error", why)
	if d, ok := n.drv.(FailureTaker); ok {
		d.NodeFailed()
	}
	name := n.name
	n.g.sink.Emit(types.BlockImageCorruptedEvent{NodeName: &name, Msg: why.Error(), Fatal: true})
	n.Bump()
}

// Failed tells whether Fail was called.
func (n *Node) Failed() bool { return n.guard.failed.Load() }

// Guarded calls f, which has n's driver do something that is no request: with snapshots, bitmaps,
// the header, options. A panic in f is an EIO, and the node fails, as what the driver has in memory
// is in doubt. The driver of a node that has failed is asked for nothing any more: errors are those
// of f, and EIO.
func (n *Node) Guarded(f func() error) error {
	if err := n.guard.usable(); err != nil {
		return err
	}
	return n.guard.careful(f)
}
