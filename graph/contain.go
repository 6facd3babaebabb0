package graph

import (
	"context"
	"log/slog"
	"syscall"

	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// guard stands between a node and the driver that does its requests: a panic in the driver becomes
// an EIO of the request, and the node takes no more requests, as what the driver keeps in memory is
// in doubt. Its methods are Guarded of those of the driver, written out: with a closure each would
// cost as much as all the rest of what a node does.
type guard struct {
	Driver
	n       *Node
	writer  Writer
	zeroer  Zeroer
	flusher Flusher
	discard Discarder
	status  BlockStatuser
	mapper  Mapper
	copier  CopyRanger
	resizer Resizer
}

// guard puts one between n and its driver, with those of the optional methods that the driver has.
func (s *ioState) guard(n *Node) {
	g, ok := &guard{Driver: n.drv, n: n}, false
	s.drv = g
	if g.writer, ok = n.drv.(Writer); ok {
		s.writer = g
	}
	if g.zeroer, ok = n.drv.(Zeroer); ok {
		s.zeroer = g
	}
	if g.flusher, ok = n.drv.(Flusher); ok {
		s.flusher = g
	}
	if g.discard, ok = n.drv.(Discarder); ok {
		s.discard = g
	}
	if g.status, ok = n.drv.(BlockStatuser); ok {
		s.status = g
	}
	if g.mapper, ok = n.drv.(Mapper); ok {
		s.mapper = g
	}
	if g.copier, ok = n.drv.(CopyRanger); ok {
		s.copier = g
	}
	if g.resizer, ok = n.drv.(Resizer); ok {
		s.resizer = g
	}
}

// errFailed is what requests to a node that has failed get.
var errFailed = blk.Text("The node is unusable after an internal error", syscall.EIO)

// Fail makes the node unusable: all requests fail with EIO from now on, and nothing that its driver
// has in memory is written any more. Queries, and taking it out of the graph, work as before. why
// is told to clients, once.
func (n *Node) Fail(why error) {
	if n.failed.Swap(true) {
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
func (n *Node) Failed() bool { return n.failed.Load() }

// usable is the error of a node that has failed.
func (g *guard) usable() error {
	if g.n.failed.Load() {
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

// Guarded calls f, which has n's driver do something that is no request: with snapshots, bitmaps,
// the header, options. A panic in f is an EIO, and the node fails, as what the driver has in memory
// is in doubt. The driver of a node that has failed is asked for nothing any more: errors are those
// of f, and EIO.
func (n *Node) Guarded(f func() error) error {
	if n.failed.Load() {
		return errFailed
	}
	return n.careful(f)
}

// careful is Guarded also for a node that has failed: for the end of a transaction, and for
// closing.
func (n *Node) careful(f func() error) (err error) {
	g := guard{n: n}
	defer g.caught(&err)
	return f()
}

// ReadAt implements that of the driver.
func (g *guard) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.Driver.ReadAt(r, v, off, f)
}

// WriteAt implements that of the driver.
func (g *guard) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.writer.WriteAt(r, v, off, f)
}

// Zero implements that of the driver.
func (g *guard) Zero(r *blk.Req, off, n int64, f blk.Flags) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.zeroer.Zero(r, off, n, f)
}

// Flush implements that of the driver.
func (g *guard) Flush(r *blk.Req) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.flusher.Flush(r)
}

// Discard implements that of the driver.
func (g *guard) Discard(r *blk.Req, off, n int64) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.discard.Discard(r, off, n)
}

// Status implements that of the driver.
func (g *guard) Status(r *blk.Req, off, n int64) (x blk.Extent, err error) {
	if err := g.usable(); err != nil {
		return x, err
	}
	defer g.caught(&err)
	return g.status.Status(r, off, n)
}

// Map implements that of the driver.
func (g *guard) Map(r *blk.Req, off, n int64, m *blk.Mapping) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.mapper.Map(r, off, n, m)
}

// CopyFrom implements that of the driver.
func (g *guard) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.copier.CopyFrom(r, off, src, f)
}

// Resize implements that of the driver.
func (g *guard) Resize(ctx context.Context, size int64, m blk.Prealloc) (err error) {
	if err := g.usable(); err != nil {
		return err
	}
	defer g.caught(&err)
	return g.resizer.Resize(ctx, size, m)
}
