// Package export holds the exports of the daemon: block-export-add and -del, what
// query-block-exports shows, and the servers that exports need.
//
// # Life of an export
//
//	Add --> checked --> root on the node --> served --Del, StopNBD, Close--> shutting down --> root gone --> BLOCK_EXPORT_DELETED
//
// An export is a root of the graph: it follows its node when that is replaced. Shutting down drops
// the clients at once; the export goes when their last request has ended, which a stuck device
// can delay without end. Commands wait for it no longer than Grace.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"qblockd/blockdev/export/nbd"
	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Grace is how long a command waits for requests of clients that were dropped.
const Grace = 250 * time.Millisecond

// sector is the unit that the size of an export is cut to, in bytes.
const sector = 512

// Options of a Table; the zero value gives the defaults.
type Options struct {
	// SocketMode is the mode of socket files; 0: 0600.
	SocketMode os.FileMode
	// Iothread finds an iothread object, nil if there is none of that id; nil: there are none at all.
	Iothread func(id string) Workers
	// NBD are the limits of the NBD server; MaxConns (0: nbd.DefaultMaxConns) holds where StartNBD is not told
	// another number. Idle and Log are the table's.
	NBD nbd.Options
	// Idle is called, from a goroutine of its own, when clients have gone that needed much memory; nil: not called.
	Idle func()
	// Leaving is called before an export is told to be gone from its node; nil: not called.
	Leaving func(n *graph.Node)
	// Log takes what happened to connections; nil: nothing is logged.
	Log *slog.Logger
}

// Table is all exports of a graph and the NBD server. All methods may be called from any goroutine.
//
// Lock order: homes.mu first. Table.mu is a leaf but for the locks of package nbd; no call of package graph is made under it.
type Table struct {
	g    *graph.Graph
	opts Options

	homes homes

	mu sync.Mutex
	// oldest first
	list []*entry // +checklocks:mu
	// ids in use, of exports being added too
	taken map[string]bool // +checklocks:mu
	// nil: not running
	server *nbd.Server // +checklocks:mu
	// a server is being started
	starts bool // +checklocks:mu
	closed bool // +checklocks:mu
}

// entry is one export.
type entry struct {
	id     string
	root   *graph.Root
	cancel context.CancelFunc // of the root's context: requests that wait for others give up
	nbd    *nbd.Export
	server *nbd.Server // of nbd
	// workers serve the requests that have to wait; it points to nil for no group.
	workers atomic.Pointer[Workers]
	fixed   bool // the node must not be moved into another iothread
	bitmaps []*graph.DirtyBitmap

	closing bool          // guarded by Table.mu
	gone    chan struct{} // closed when the export is off the list and its event was sent
}

// New makes an empty table for the nodes of g.
func New(g *graph.Graph, o Options) *Table {
	return &Table{g: g, opts: o, taken: map[string]bool{}}
}

// SetSocketMode changes the mode of socket files that are made from now on.
func (t *Table) SetSocketMode(m os.FileMode) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opts.SocketMode = m
}

// Add makes an export. It waits while the node is being changed by others, no longer than ctx.
// Source: QAPI, block-export-add.
func (t *Table) Add(ctx context.Context, o *types.BlockExportOptions) error {
	if !types.WellFormedID(o.ID) {
		return errors.New("Invalid block export id")
	}
	if err := t.reserve(o.ID); err != nil {
		return err
	}
	e, stopped, err := t.make(ctx, o)
	if err != nil {
		t.mu.Lock()
		delete(t.taken, o.ID)
		t.mu.Unlock()
		return err
	}
	if stopped {
		// Whoever stopped the server did not see it.
		e.shutdown()
		t.finish(e)
		return nbd.ErrNotRunning
	}
	return nil
}

func (t *Table) reserve(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.taken[id] {
		return fmt.Errorf("Block export id '%s' is already in use", id)
	}
	t.taken[id] = true
	return nil
}

// make makes what o describes and puts it on the list; stopped tells that the server was stopped meanwhile, and that
// the export, closing already, is the caller's to end.
func (t *Table) make(ctx context.Context, o *types.BlockExportOptions) (e *entry, stopped bool, err error) {
	b, ok := o.U.(*types.BlockExportOptionsNbd)
	var n *graph.Node
	hold, err := t.g.Hold(ctx, func() ([]*graph.Node, error) {
		if n = t.g.Node(o.NodeName); n == nil {
			return nil, fmt.Errorf("Cannot find device='' nor node-name='%s'", o.NodeName)
		}
		nodes := []*graph.Node{n}
		if ok {
			nodes = append(nodes, t.bitmapNodes(n, b.Bitmaps)...)
		}
		return nodes, nil
	})
	if err != nil {
		return nil, false, err
	}
	defer hold.Release()
	writable := isSet(o.Writable)
	if writable && n.ReadOnly() {
		return nil, false, errors.New("Cannot export read-only node as writable")
	}
	workers, err := t.asked(o)
	if err != nil {
		return nil, false, err
	}
	if !ok {
		return nil, false, errors.New("No driver found for the requested export type")
	}
	spec := nbd.Spec{
		Name:            o.NodeName,
		ReadOnly:        !writable,
		Writethrough:    isSet(o.Writethrough),
		AllocationDepth: isSet(b.AllocationDepth),
	}
	if b.Name != nil {
		spec.Name = *b.Name
	}
	if b.Description != nil {
		spec.Description, spec.HasDescription = *b.Description, true
	}
	server := t.running()
	if server == nil {
		return nil, false, nbd.ErrNotRunning
	}
	if err := server.CheckName(&spec); err != nil {
		return nil, false, err
	}
	e = &entry{id: o.ID, server: server, gone: make(chan struct{}), fixed: isSet(o.FixedIothread)}
	if err := t.attach(ctx, e, n, writable); err != nil {
		return nil, false, err
	}
	fail := func(err error) (*entry, bool, error) {
		e.freeBitmaps()
		e.cancel()
		t.g.CloseRoot(context.Background(), e.root)
		return nil, false, err
	}
	if spec.Bitmaps, err = t.claimBitmaps(hold, e, n, b.Bitmaps, writable); err != nil {
		return fail(err)
	}
	spec.Device = device{e.root, writable}
	spec.Size = blk.AlignDown(e.root.Size(), sector)
	spec.Workers = e.currentWorkers
	if stopped, err = t.serve(e, spec, workers); err != nil {
		return fail(err)
	}
	return e, stopped, nil
}

// serve lets clients use e and puts it on the list; for stopped see make.
func (t *Table) serve(e *entry, spec nbd.Spec, w Workers) (stopped bool, err error) {
	t.homes.mu.Lock()
	defer t.homes.mu.Unlock()
	undo, err := t.place(e, w)
	if err != nil {
		return false, err
	}
	if e.nbd, err = e.server.Add(spec); err != nil {
		undo()
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	stopped = t.server != e.server
	e.closing = stopped
	t.list = append(t.list, e)
	return stopped, nil
}

// attach makes the root of e on n. An export shares everything but resize: its size is a promise to its
// clients. It takes what it needs first and stops sharing resize then, so that of
// two conflicts the same one is reported as by the reference.
func (t *Table) attach(ctx context.Context, e *entry, n *graph.Node, writable bool) error {
	need := perm.ConsistentRead
	if writable {
		need |= perm.Write
	}
	rctx, cancel := context.WithCancel(context.Background())
	tx := t.g.Begin(ctx)
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{
		EdgeName: "root",
		Kind:     graph.KindBackend,
		Claim:    perm.Claim{Need: need, Share: perm.All},
		Ctx:      rctx,
	}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		cancel()
		return err
	}
	tx2 := t.g.Begin(ctx)
	defer tx2.Abort()
	err = tx2.SetClaim(root.Edge(), perm.Claim{Need: need, Share: perm.All &^ perm.Resize})
	if err == nil {
		err = tx2.Commit()
	}
	if err != nil {
		cancel()
		t.g.CloseRoot(context.Background(), root)
		return err
	}
	e.root, e.cancel = root, cancel
	return nil
}

func isSet(b *bool) bool { return b != nil && *b }

// shutdown drops the clients of e; it does not wait.
func (e *entry) shutdown() {
	e.nbd.Shutdown()
	e.cancel()
}

// finish removes e when its last request has ended, however long that takes.
func (t *Table) finish(e *entry) {
	<-e.nbd.Done()
	node := e.root.Node()
	var hold *graph.Hold
	if node != nil && !node.MonitorOwned() {
		hold, _ = t.g.HoldNodes(context.Background(), node.Dependents()...) // it may be closed now
	}
	// Waits for nobody for long: no unit of work is in flight. It fails only with its context.
	if err := t.g.CloseRoot(context.Background(), e.root); err != nil && t.opts.Log != nil {
		t.opts.Log.Error("export could not be detached", "id", e.id, "err", err)
	}
	hold.Release()
	e.cancel()
	e.freeBitmaps()
	t.mu.Lock()
	for i, x := range t.list {
		if x == e {
			t.list = append(t.list[:i:i], t.list[i+1:]...)
			break
		}
	}
	delete(t.taken, e.id)
	t.mu.Unlock()
	if p := &trace.ExportDelete; p.On() {
		p.Log(slog.String("export", e.id))
	}
	if node != nil && t.opts.Leaving != nil {
		t.opts.Leaving(node)
	}
	t.g.Sink().Emit(types.BlockExportDeletedEvent{ID: e.id})
	close(e.gone)
}

// Del asks for the export to be removed. It waits for dropped clients no longer than
// Grace; BLOCK_EXPORT_DELETED tells the end. Source: QAPI, block-export-del.
func (t *Table) Del(ctx context.Context, id string, mode types.BlockExportRemoveMode) error {
	if mode != types.BlockExportRemoveModeHard {
		t.awaitHungUp(ctx, id)
	}
	t.mu.Lock()
	e := t.findLocked(id)
	switch {
	case e == nil:
		t.mu.Unlock()
		return fmt.Errorf("Export '%s' is not found", id)
	case e.closing:
		t.mu.Unlock()
		return fmt.Errorf("Export '%s' is already shutting down", id)
	}
	if mode != types.BlockExportRemoveModeHard && !e.nbd.ShutdownIfIdle() {
		t.mu.Unlock()
		return blk.WithHint(fmt.Errorf("export '%s' still in use", id), "Use mode='hard' to force client disconnect\n")
	}
	e.closing = true
	t.mu.Unlock()
	e.shutdown()
	panics.Go("the end of an export", func() { t.finish(e) }, nil)
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	e.wait(ctx)
	return nil
}

// awaitHungUp waits for clients of an export whose sockets are closed, no longer than Grace.
func (t *Table) awaitHungUp(ctx context.Context, id string) {
	t.mu.Lock()
	e := t.findLocked(id)
	t.mu.Unlock()
	if e == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	e.nbd.AwaitHungUp(ctx)
}

// wait waits for e to be gone, no longer than ctx, and tells whether it is.
func (e *entry) wait(ctx context.Context) bool {
	select {
	case <-e.gone:
		return true
	case <-ctx.Done():
	}
	select {
	case <-e.gone:
		return true
	default:
		return false
	}
}

// +checklocks:t.mu
func (t *Table) findLocked(id string) *entry {
	for _, e := range t.list {
		if e.id == id {
			return e
		}
	}
	return nil
}

// Type is the type of the export of that id; ok is false if there is none.
func (t *Table) Type(id string) (typ types.BlockExportType, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.findLocked(id) == nil {
		return "", false
	}
	return types.BlockExportTypeNbd, true
}

// Query lists the exports, newest first.
func (t *Table) Query() []*types.BlockExportInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := make([]*types.BlockExportInfo, 0, len(t.list))
	for i := len(t.list) - 1; i >= 0; i-- {
		e := t.list[i]
		info := &types.BlockExportInfo{ID: e.id, Type: types.BlockExportTypeNbd, ShuttingDown: e.closing}
		if n := e.root.Node(); n != nil {
			info.NodeName = n.Name()
		}
		l = append(l, info)
	}
	return l
}

// removeAll drops the clients of all exports, then removes the exports, oldest first; those
// whose requests take longer than ctx and Grace allow go later. Reports whether all are gone.
func (t *Table) removeAll(ctx context.Context) bool {
	t.mu.Lock()
	list := append([]*entry(nil), t.list...)
	first := make([]bool, len(list))
	for i, e := range list {
		first[i] = !e.closing
		e.closing = true
	}
	t.mu.Unlock()
	for _, e := range list {
		e.shutdown()
	}
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	all := true
	for i, e := range list {
		if first[i] {
			panics.Go("the end of an export", func() { t.finish(e) }, nil)
		}
		all = e.wait(ctx) && all
	}
	return all
}

// Close removes all exports and stops the NBD server, for the end of the daemon. It waits
// for clients' requests no longer than ctx and Grace. Nothing can be added afterwards.
func (t *Table) Close(ctx context.Context) {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	if t.StopNBD(ctx) != nil {
		t.removeAll(ctx)
	}
}
