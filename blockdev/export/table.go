// Package export holds the exports of the daemon: block-export-add and -del, and what
// query-block-exports shows. It knows no protocol: a Type is a way to export, of which package nbd
// is one, and its Server serves one export.
//
// # Life of an export
//
//	Add --> checked --> root on the node --> served
//	                                           | Del, RemoveAll, Close
//	                                           v
//	     BLOCK_EXPORT_DELETED <-- root gone <-- shutting down
//
// An export is a root of the graph: it follows its node when that is replaced. Shutting down drops
// the clients at once; the export goes when their last request has ended, which a stuck device
// can delay without end. Commands wait for it no longer than Grace.
package export

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Grace is how long a command waits for requests of clients that were dropped.
const Grace = 250 * time.Millisecond

// Options of a Table; the zero value gives the defaults.
type Options struct {
	// Iothread finds an iothread object, nil if there is none of that id; nil: there are none at
	// all.
	Iothread func(id string) Workers
	// Leaving is called before an export is told to be gone from its node; nil: not called.
	Leaving func(n *graph.Node)
	// Log takes what went wrong with nobody to tell; nil: nothing is logged.
	Log *slog.Logger
}

// Table is all exports of a graph. All methods may be called from any goroutine.
//
// Lock order: iothreads.mu first. Table.mu is a leaf: no Type and no Server is called under it, and
// of the graph only what takes no lock.
type Table struct {
	g     *graph.Graph
	opts  Options
	types map[types.BlockExportType]Type // constant once there are exports

	iothreads iothreads

	mu sync.Mutex
	// those on the list and those being made
	ids map[string]*Export // +checklocks:mu
	// those that are served, oldest first
	list []*Export // +checklocks:mu
}

// New makes an empty table for the nodes of g.
func New(g *graph.Graph, o Options) *Table {
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
	return &Table{g: g, opts: o, types: map[types.BlockExportType]Type{}, ids: map[string]*Export{}}
}

// Register makes typ serve exports called name, before the first is added.
func (t *Table) Register(name types.BlockExportType, typ Type) { t.types[name] = typ }

// Add makes an export; o is the table's from then on. It waits while the node is being changed by
// others, no longer than ctx. Source: QAPI, block-export-add.
func (t *Table) Add(ctx context.Context, o *types.BlockExportOptions) error {
	if !types.WellFormedID(o.ID) {
		return errors.New("Invalid block export id")
	}
	typ := t.types[o.Type]
	if typ == nil {
		return errors.New("No driver found for the requested export type")
	}
	x := &Export{Options: o, gone: make(chan struct{}), resized: make(chan struct{}, 1)}
	x.Errors = NewErrors(o.XQblockdOnReadError, o.XQblockdOnWriteError, x.tellError)
	if err := t.reserve(x); err != nil {
		return err
	}
	if err := t.make(ctx, x, typ); err != nil {
		t.forget(x)
		return err
	}
	if x.removed != nil {
		x.shutdown()
		t.finish(x)
	}
	return x.removed
}

func (t *Table) reserve(x *Export) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ids[x.Options.ID] != nil {
		return fmt.Errorf("Block export id '%s' is already in use", x.Options.ID)
	}
	t.ids[x.Options.ID] = x
	return nil
}

// forget takes x off the list and gives its id back.
func (t *Table) forget(x *Export) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = slices.DeleteFunc(t.list, func(y *Export) bool { return y == x })
	delete(t.ids, x.Options.ID)
}

// make makes what x.Options describe and puts it on the list. If it was removed meanwhile it is
// closing already, and the caller's to end.
func (t *Table) make(ctx context.Context, x *Export, typ Type) error {
	var n *graph.Node
	var workers Workers
	hold, err := t.g.Hold(ctx, func() (held []*graph.Node, err error) {
		n, workers, err = t.check(x.Options)
		if err == nil {
			held, err = typ.Check(n, x.Options)
		}
		if err == nil && n.Inactive() {
			held = append(held, n.NodesBelow()...)
		}
		return append(held, n), err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if n.Inactive() && !types.Or(x.Options.AllowInactive, false) {
		if err := graph.Activate(ctx, n); err != nil {
			return err
		}
	}
	if err := t.attach(ctx, x, typ, n); err != nil {
		return err
	}
	if err := t.serve(x, typ, hold, workers); err != nil {
		x.freeBitmaps()
		x.cancel()
		t.g.CloseRoot(context.Background(), x.Root)
		return err
	}
	return nil
}

// check finds the node of an export and the group that its options name, and what is wrong with
// them whatever the type.
func (t *Table) check(o *types.BlockExportOptions) (*graph.Node, Workers, error) {
	n := t.g.Node(o.NodeName)
	if n == nil {
		return nil, nil, fmt.Errorf("Cannot find device='' nor node-name='%s'", o.NodeName)
	}
	if types.Or(o.Writable, false) && n.ReadOnly() {
		return nil, nil, errors.New("Cannot export read-only node as writable")
	}
	w, err := t.asked(o)
	return n, w, err
}

// serve lets clients use x and puts it on the list.
func (t *Table) serve(x *Export, typ Type, hold *graph.Hold, w Workers) error {
	t.iothreads.mu.Lock()
	defer t.iothreads.mu.Unlock()
	undo, err := t.place(x, w)
	if err != nil {
		return err
	}
	server, err := typ.Serve(x, hold)
	if err != nil {
		undo()
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	x.server, x.closing = server, x.removed != nil
	t.list = append(t.list, x)
	return nil
}

// attach makes the root of x on n. It takes what all exports need first, and what its type says
// then, so that of two conflicts the same one is reported as by QEMU.
func (t *Table) attach(ctx context.Context, x *Export, typ Type, n *graph.Node) error {
	need := perm.ConsistentRead
	if x.Writable() {
		need |= perm.Write
	}
	rctx, cancel := context.WithCancel(context.Background())
	root, err := t.g.AddRoot(ctx, graph.RootSpec{
		EdgeName: "root",
		Kind:     graph.KindBackend,
		Claim:    perm.Claim{Need: need, Share: perm.All},
		Of:       graph.NewRecord(graph.Key{Kind: graph.StateExport, Name: x.Options.ID}, x.Options),
		Ctx:      rctx,

		AllowInactive: types.Or(x.Options.AllowInactive, false),
		Resized:       x.noteSize,
	}, n)
	if err != nil {
		cancel()
		return err
	}
	err = t.g.Do(ctx, func(tx *graph.Tx) error {
		return tx.SetClaim(root.Edge(), typ.Claim(x.Options, need))
	})
	if err != nil {
		cancel()
		t.g.CloseRoot(context.Background(), root)
		return err
	}
	root.SetAccount(&x.account)
	x.Root, x.cancel = root, cancel
	return nil
}

// finish removes x when its last request has ended, however long that takes.
func (t *Table) finish(x *Export) {
	<-x.server.Done()
	node := x.Root.Node()
	var hold *graph.Hold
	if node != nil && !node.MonitorOwned() {
		hold, _ = t.g.HoldNodes(context.Background(), node.Dependents()...) // it may be closed now
	}
	// Waits for nobody for long: no unit of work is in flight. It fails only with its context.
	if err := t.g.CloseRoot(context.Background(), x.Root); err != nil {
		t.opts.Log.Error("export could not be detached", "id", x.Options.ID, "err", err)
	}
	hold.Release()
	x.cancel()
	x.freeBitmaps()
	t.forget(x)
	if p := &trace.ExportDelete; p.On() {
		p.Log(slog.String("export", x.Options.ID))
	}
	if node != nil && t.opts.Leaving != nil {
		t.opts.Leaving(node)
	}
	t.g.Sink().Emit(types.BlockExportDeletedEvent{ID: x.Options.ID})
	close(x.gone)
}

// Del asks for the export to be removed. It waits for dropped clients no longer than Grace;
// BLOCK_EXPORT_DELETED tells the end. Source: QAPI, block-export-del.
func (t *Table) Del(ctx context.Context, id string, mode types.BlockExportRemoveMode) error {
	if mode != types.BlockExportRemoveModeHard {
		if err := t.shutdownIfIdle(ctx, id); err != nil {
			return err
		}
	}
	x, err := t.find(id, true)
	if err != nil {
		return err
	}
	x.shutdown()
	panics.Go("the end of an export", func() { t.finish(x) }, nil)
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	x.wait(ctx)
	return nil
}

// shutdownIfIdle shuts the export down, or says why a safe removal does not.
func (t *Table) shutdownIfIdle(ctx context.Context, id string) error {
	x, err := t.find(id, false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	if !x.server.ShutdownIfIdle(ctx) {
		return blk.WithHint(fmt.Errorf("export '%s' still in use", id), "Use mode='hard' to force client disconnect\n")
	}
	return nil
}

// find finds an export that is served, and is not shutting down but, if closing, from now on.
func (t *Table) find(id string, closing bool) (*Export, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.servedLocked(id)
	switch {
	case x == nil:
		return nil, fmt.Errorf("Export '%s' is not found", id)
	case x.closing:
		return nil, fmt.Errorf("Export '%s' is already shutting down", id)
	}
	x.closing = closing
	return x, nil
}

// servedLocked is the export of that id, nil if there is none or it is being made.
// +checklocks:t.mu
func (t *Table) servedLocked(id string) *Export {
	if x := t.ids[id]; x != nil && x.server != nil {
		return x
	}
	return nil
}

// Resume lets an export go on that an error has stopped. Source: QAPI, x-qblockd-export-resume.
func (t *Table) Resume(id string) error {
	x, err := t.find(id, false)
	if err == nil && !x.Errors.Resume() {
		err = fmt.Errorf("Export '%s' is not stopped", id)
	}
	return err
}

// Type is the type of the export of that id; ok is false if there is none.
func (t *Table) Type(id string) (typ types.BlockExportType, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.servedLocked(id); x != nil {
		return x.Options.Type, true
	}
	return "", false
}

// Options are what would make the exports again, oldest first, on the nodes that they show now.
func (t *Table) Options() []*types.BlockExportOptions {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := make([]*types.BlockExportOptions, len(t.list))
	for i, x := range t.list {
		o := *x.Options
		if n := x.Root.Node(); n != nil {
			o.NodeName = n.Name()
		}
		l[i] = &o
	}
	return l
}

// Query lists the exports, newest first.
func (t *Table) Query() []*types.BlockExportInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := make([]*types.BlockExportInfo, 0, len(t.list))
	for _, x := range slices.Backward(t.list) {
		info := &types.BlockExportInfo{ID: x.Options.ID, Type: x.Options.Type, ShuttingDown: x.closing,
			XQblockdIoStatus: x.Errors.Status()}
		if n := x.Root.Node(); n != nil {
			info.NodeName = n.Name()
		}
		l = append(l, info)
	}
	return l
}

// Stats are the requests of the export of that id, as they reached its node; nil if there is none.
// A request that was carried out in parts counts as several. No command shows them:
// query-blockstats leaves out exports, as QEMU does.
func (t *Table) Stats(id string) *types.BlockDeviceStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.servedLocked(id); x != nil {
		return x.account.Stats(x.Root.Node())
	}
	return nil
}

// RemoveAll drops the clients of all exports of a type, of all types for "", then removes the
// exports, oldest first; those whose requests take longer than ctx and Grace allow go later. An Add
// that is under way fails with why.
func (t *Table) RemoveAll(ctx context.Context, typ types.BlockExportType, why error) {
	t.mu.Lock()
	for _, x := range t.ids {
		if x.server == nil && (typ == "" || x.Options.Type == typ) {
			x.removed = why
		}
	}
	var list, first []*Export
	for _, x := range t.list {
		if typ != "" && x.Options.Type != typ {
			continue
		}
		list = append(list, x)
		if !x.closing {
			x.closing = true
			first = append(first, x)
		}
	}
	t.mu.Unlock()
	for _, x := range list {
		x.shutdown()
	}
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	for _, x := range list {
		if slices.Contains(first, x) {
			panics.Go("the end of an export", func() { t.finish(x) }, nil)
		}
		x.wait(ctx)
	}
}

// Close ends all types and removes all exports, for the end of the daemon. It waits for clients'
// requests no longer than ctx and Grace. Nothing can be added afterwards.
func (t *Table) Close(ctx context.Context) {
	for _, typ := range t.types {
		typ.Close()
	}
	t.RemoveAll(ctx, "", errors.New("The daemon is shutting down"))
}
