package nbd

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"qblockd/blockdev/export"
	"qblockd/blockdev/tlscreds"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Type is the export type "nbd". All its exports are those of one server, which Start makes.
type Type struct {
	table *export.Table
	opts  Options

	mu sync.Mutex
	// nil: not running
	server   *Server // +checklocks:mu
	starting bool    // +checklocks:mu
	closed   bool    // +checklocks:mu
}

var _ export.Type = (*Type)(nil)

// NewType makes the type known to t. Options.MaxConns (0: DefaultMaxConns) holds where Start is not
// told another number.
func NewType(t *export.Table, o Options) *Type {
	o.MaxConns = cmp.Or(o.MaxConns, DefaultMaxConns)
	typ := &Type{table: t, opts: o}
	t.Register(types.BlockExportTypeNbd, typ)
	return typ
}

// ErrNotRunning: there is no server to serve an export.
var ErrNotRunning = errors.New("NBD server not running")

// Start starts the server. What start does not say is left to the options; 0 means no bound. It
// blocks while names are looked up. Source: QAPI, nbd-server-start.
func (t *Type) Start(ctx context.Context, start *types.NbdServerOptions) error {
	if err := t.begin(); err != nil {
		return err
	}
	tls, err := tlscreds.NewServer(t.opts.Objects, start.TlsCreds, start.TlsAuthz)
	var l net.Listener
	if err == nil {
		l, err = listen(ctx, &start.Addr, t.opts.SocketMode)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.starting = false
	if err != nil {
		return err
	}
	if t.closed {
		l.Close()
		return errShutdown
	}
	o := t.opts
	o.TLS = tls
	if start.MaxConnections != nil {
		o.MaxConns = *start.MaxConnections
	}
	if s := start.HandshakeMaxSeconds; s != nil {
		if o.Handshake = time.Duration(*s) * time.Second; *s == 0 {
			o.Handshake = -1 // 0 means the default there
		}
	}
	t.server = Serve(l, o)
	return nil
}

var errShutdown = errors.New("The daemon is shutting down")

// begin keeps others from starting a server.
func (t *Type) begin() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.server != nil || t.starting:
		return errors.New("NBD server already running")
	case t.closed:
		return errShutdown
	}
	t.starting = true
	return nil
}

// Stop removes all NBD exports, drops all clients and removes the socket. It waits for clients'
// requests no longer than ctx and export.Grace. Source: QAPI, nbd-server-stop.
func (t *Type) Stop(ctx context.Context) error {
	s := t.take()
	if s == nil {
		return ErrNotRunning
	}
	s.Close()
	t.table.RemoveAll(ctx, types.BlockExportTypeNbd, ErrNotRunning)
	ctx, cancel := context.WithTimeout(ctx, export.Grace)
	defer cancel()
	s.Wait(ctx)
	return nil
}

// take takes the server away, if there is one: it is the caller's to close.
func (t *Type) take() *Server {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.server
	t.server = nil
	return s
}

// running is the server, or nil.
func (t *Type) running() *Server {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.server
}

// Close implements export.Type.
func (t *Type) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	if s := t.take(); s != nil {
		s.Close()
	}
}

// Check implements export.Type.
func (t *Type) Check(n *graph.Node, o *types.BlockExportOptions) ([]*graph.Node, error) {
	b := o.U.(*types.BlockExportOptionsNbd)
	if b.Name == nil {
		b.Name = &o.NodeName // at this time: the export may come to show other nodes
	}
	s := t.running()
	if s == nil {
		return nil, ErrNotRunning
	}
	return export.BitmapNodes(n, b.Bitmaps), s.CheckName(spec(o))
}

// Claim implements export.Type. The size is a promise to clients.
func (t *Type) Claim(_ *types.BlockExportOptions, need perm.Perm) perm.Claim {
	return perm.Claim{Need: need, Share: perm.All &^ perm.Resize}
}

// spec are the options of an export as the server knows them.
func spec(o *types.BlockExportOptions) *Spec {
	b := o.U.(*types.BlockExportOptionsNbd)
	s := &Spec{
		Name:            *b.Name,
		ReadOnly:        !types.Or(o.Writable, false),
		Writethrough:    types.Or(o.Writethrough, false),
		AllocationDepth: types.Or(b.AllocationDepth, false),
	}
	if b.Description != nil {
		s.Description, s.HasDescription = *b.Description, true
	}
	return s
}

// Serve implements export.Type.
func (t *Type) Serve(x *export.Export, held *graph.Hold) (export.Server, error) {
	server := t.running()
	if server == nil {
		return nil, ErrNotRunning
	}
	bitmaps, err := x.ClaimBitmaps(held, x.Options.U.(*types.BlockExportOptionsNbd).Bitmaps)
	if err != nil {
		return nil, err
	}
	s := spec(x.Options)
	s.Device, s.Size, s.Workers, s.Errors = device{x.Root, x.Writable()}, x.Size(), x.Workers, x.Errors
	for _, d := range bitmaps {
		s.Bitmaps = append(s.Bitmaps, Bitmap{Name: d.Name(), Bits: d.Bits()})
	}
	e, err := server.Add(*s)
	if err != nil {
		return nil, err // not e: it would be an interface of nil
	}
	return e, nil
}

// device shows a root to the server.
type device struct {
	*graph.Root
	writable bool // the root claims to write
}

// Prefetch implements Device. Without a claim to write nothing can be copied into the top
// layer; the data are read, which brings them into the host's cache.
func (d device) Prefetch(r *blk.Req, off, n int64) error {
	if d.writable {
		return d.Root.Prefetch(r, off, n)
	}
	const piece = 1 << 20
	buf := blk.GetBuf(int(min(n, piece)), 0)
	defer blk.PutBuf(buf)
	for end := off + n; off < end; {
		k := min(end-off, piece)
		if err := d.Edge().ReadAt(r, blk.Buf(buf.B[:k]), off, 0); err != nil {
			return err
		}
		off += k
	}
	return nil
}

// Status implements Device: what the whole chain holds.
func (d device) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return d.Root.StatusAbove(r, nil, false, off, n)
}

// Limits implements Device.
func (d device) Limits() blk.Limits { return d.Root.Edge().Caps().Limits }
