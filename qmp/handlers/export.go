package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev/export"
	"qblockd/blockdev/export/nbd"
	"qblockd/graph"
	"qblockd/schema/types"
)

// BlockExport executes the commands for exports and the NBD server.
type BlockExport struct {
	Graph   *graph.Graph
	Exports *export.Table
	NBD     *nbd.Type
}

// errFD: descriptors are for the command line, a client cannot know which ones are free.
var errFD = errors.New("only QEMU supports file descriptor passing")

// NbdServerStart implements types.BlockExportHandler.
func (h BlockExport) NbdServerStart(ctx context.Context, a *types.NbdServerStartArgs) error {
	if a.Addr.Type == types.SocketAddressTypeFd {
		return errFD
	}
	return h.NBD.Start(ctx, &types.NbdServerOptions{
		Addr: *nbd.Flatten(&a.Addr), TlsCreds: a.TlsCreds, TlsAuthz: a.TlsAuthz,
		MaxConnections: a.MaxConnections, HandshakeMaxSeconds: a.HandshakeMaxSeconds,
	})
}

// NbdServerStop implements types.BlockExportHandler.
func (h BlockExport) NbdServerStop(ctx context.Context) error { return h.NBD.Stop(ctx) }

// NbdServerAdd implements types.BlockExportHandler. Unlike block-export-add it turns a writable
// export of a read-only node into a read-only one.
func (h BlockExport) NbdServerAdd(ctx context.Context, a *types.NbdServerAddOptions) error {
	n := h.Graph.Node(a.Device)
	if n == nil {
		return fmt.Errorf("Cannot find device='%s' nor node-name='%s'", a.Device, a.Device)
	}
	name := types.Or(a.Name, a.Device)
	o := &types.BlockExportOptions{
		Type:     types.BlockExportTypeNbd,
		ID:       name,
		NodeName: a.Device,
		Writable: a.Writable,
		U:        &types.BlockExportOptionsNbd{Name: &name, Description: a.Description},
	}
	if n.ReadOnly() {
		o.Writable = nil
	}
	if a.Bitmap != nil {
		o.U.(*types.BlockExportOptionsNbd).Bitmaps = []*types.BlockDirtyBitmapOrStr{{Local: a.Bitmap}}
	}
	return h.Exports.Add(ctx, o)
}

// NbdServerRemove implements types.BlockExportHandler.
func (h BlockExport) NbdServerRemove(ctx context.Context, a *types.NbdServerRemoveArgs) error {
	if t, ok := h.Exports.Type(a.Name); ok && t != types.BlockExportTypeNbd {
		return fmt.Errorf("Block export '%s' is not an NBD export", a.Name)
	}
	return h.Exports.Del(ctx, a.Name, types.Or(a.Mode, types.BlockExportRemoveModeSafe))
}

// BlockExportAdd implements types.BlockExportHandler.
func (h BlockExport) BlockExportAdd(ctx context.Context, a *types.BlockExportOptions) error {
	if v, ok := a.U.(*types.BlockExportOptionsVhostUserBlk); ok && v.Addr.Type == types.SocketAddressTypeFd {
		return errFD
	}
	return h.Exports.Add(ctx, a)
}

// BlockExportDel implements types.BlockExportHandler.
func (h BlockExport) BlockExportDel(ctx context.Context, a *types.BlockExportDelArgs) error {
	return h.Exports.Del(ctx, a.ID, types.Or(a.Mode, types.BlockExportRemoveModeSafe))
}

// XQblockdExportResume implements types.BlockExportHandler.
func (h BlockExport) XQblockdExportResume(_ context.Context, a *types.XQblockdExportResumeArgs) error {
	return h.Exports.Resume(a.ID)
}

// QueryBlockExports implements types.BlockExportHandler.
func (h BlockExport) QueryBlockExports(context.Context) ([]*types.BlockExportInfo, error) {
	return h.Exports.Query(), nil
}
