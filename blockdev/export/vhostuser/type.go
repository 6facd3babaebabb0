package vhostuser

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"

	"qblockd/blockdev/export"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// Options of a Type; the zero value gives the defaults.
type Options struct {
	// SocketMode is that of socket files; 0 means 0600.
	SocketMode os.FileMode
	// Log takes what front ends do wrong; nil: nothing is logged.
	Log *slog.Logger
}

// Type is the export type "vhost-user-blk". Each export has a socket of its own.
type Type struct {
	opts   Options
	closed atomic.Bool
}

var _ export.Type = (*Type)(nil)

// NewType makes the type known to t.
func NewType(t *export.Table, o Options) *Type {
	o.Log = cmp.Or(o.Log, slog.New(slog.DiscardHandler))
	typ := &Type{opts: o}
	t.Register(types.BlockExportTypeVhostUserBlk, typ)
	return typ
}

var errShutdown = errors.New("The daemon is shutting down")

// Close implements export.Type.
func (t *Type) Close() { t.closed.Store(true) }

// Limits of block sizes, in bytes.
const (
	minBlock = blk.SectorSize
	maxBlock = 2 << 20
)

// Check implements export.Type.
func (t *Type) Check(_ *graph.Node, o *types.BlockExportOptions) ([]*graph.Node, error) {
	v := o.U.(*types.BlockExportOptionsVhostUserBlk)
	if n := v.LogicalBlockSize; n != nil && *n != 0 {
		switch {
		case *n < minBlock || *n > maxBlock:
			return nil, fmt.Errorf("Property %s.logical-block-size doesn't take value %d (minimum: %d, maximum: %d)",
				o.ID, *n, minBlock, maxBlock)
		case *n&(*n-1) != 0:
			return nil, fmt.Errorf("Property %s.logical-block-size doesn't take value '%d', it's not a power of 2", o.ID, *n)
		}
	}
	if types.Or(v.NumQueues, 1) == 0 {
		return nil, errors.New("num-queues must be greater than 0")
	}
	if a := v.Addr.Type; a != types.SocketAddressTypeUnix && a != types.SocketAddressTypeFd {
		return nil, errors.New("Only socket address types 'unix' and 'fd' are supported")
	}
	if t.closed.Load() {
		return nil, errShutdown
	}
	return nil, nil
}

// Claim implements export.Type. Front ends are told of another size.
func (t *Type) Claim(_ *types.BlockExportOptions, need perm.Perm) perm.Claim {
	return perm.Claim{Need: need, Share: perm.All}
}

// Serve implements export.Type.
func (t *Type) Serve(x *export.Export, _ *graph.Hold) (export.Server, error) {
	if t.closed.Load() {
		return nil, errShutdown
	}
	v := x.Options.U.(*types.BlockExportOptionsVhostUserBlk)
	l, err := t.listen(&v.Addr)
	if err != nil {
		return nil, err
	}
	return newServer(x, l, t.opts.Log), nil
}

func (t *Type) listen(a *types.SocketAddress) (net.Listener, error) {
	if u, ok := a.U.(*types.UnixSocketAddress); ok {
		return sockets.ListenAt(u, t.opts.SocketMode)
	}
	return sockets.ListenFD(a.U.(*types.String).Str)
}
