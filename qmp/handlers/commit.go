package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs/chain"
	"qblockd/jobs/commit"
	"qblockd/jobs/mirror"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockCommit implements types.BlockJobHandler.
func (h BlockJob) BlockCommit(ctx context.Context, a *types.BlockCommitArgs) error {
	var device, top, base *graph.Node
	hold, err := h.Graph.Hold(ctx, func() (_ []*graph.Node, err error) {
		device, top, base, err = h.commitNodes(a)
		return chain.Between(device, chain.Below(base)), err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	onError := types.BlockdevOnErrorReport
	if a.OnError != nil {
		onError = *a.OnError
	}
	var release func()
	filter, err := graph.GivenName(a.FilterNodeName)
	if err != nil {
		return err
	}
	if active := top.SkipFilters() == device.SkipFilters(); active || top.Claim().Need&perm.Write != 0 {
		switch {
		case a.BackingFile != nil && active:
			return errors.New("'backing-file' specified, but 'top' is the active layer")
		case a.BackingFile != nil:
			return errors.New("'backing-file' specified, but 'top' has a writer on it")
		}
		release, err = mirror.Start(ctx, h.Jobs, mirror.Args{
			Hold: hold, ID: deref(a.JobID), Type: types.JobTypeCommit, Source: top, Target: base, Base: base, Unmap: true,
			Speed: deref(a.Speed), OnSourceError: onError, OnTargetError: onError, CopyMode: types.MirrorCopyModeBackground,
			FilterNodeName: filter, ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss),
		})
	} else {
		if err := chain.Overlay(device, top).Blocked(graph.OpCommitTarget); err != nil {
			return err
		}
		if _, _, err := h.headerName(base); err != nil {
			return err
		}
		release, err = commit.Start(ctx, h.Jobs, commit.Args{
			Hold: hold, ID: deref(a.JobID), Device: device, Top: top, Base: base, BackingFile: deref(a.BackingFile), MaskProtocol: deref(a.BackingMaskProtocol),
			Speed: deref(a.Speed), OnError: onError, FilterNodeName: filter,
			ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss), HeaderName: h.headerName,
		})
	}
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}

// commitNodes finds the nodes of block-commit.
func (h BlockJob) commitNodes(a *types.BlockCommitArgs) (device, top, base *graph.Node, err error) {
	device, err = h.Nodes.LookupRoot(a.Device)
	if err != nil {
		if _, unknown := h.Nodes.Lookup(&a.Device, &a.Device); unknown != nil {
			// Clients tell versions apart by this class.
			err = blk.WithClass(errors.New("Device '"+a.Device+"' not found"), qmp.DeviceNotFound)
		}
		return nil, nil, nil, err
	}
	if err := device.Blocked(graph.OpCommitSource); err != nil {
		return nil, nil, nil, err
	}
	top, base, err = h.commitEnds(device, a)
	return device, top, base, err
}

// commitEnds finds the first node to be copied and the one that it is copied into.
func (h BlockJob) commitEnds(device *graph.Node, a *types.BlockCommitArgs) (top, base *graph.Node, err error) {
	inChain := func(above *graph.Node, name *string) (*graph.Node, error) {
		n, err := h.Nodes.Lookup(nil, name)
		if err == nil && !chain.Contains(above, n) {
			err = fmt.Errorf("'%s' is not in this backing file chain", *name)
		}
		return n, err
	}
	switch top = device; {
	case a.TopNode != nil && a.Top != nil:
		return nil, nil, errors.New("'top-node' and 'top' are mutually exclusive")
	case a.TopNode != nil:
		if top, err = inChain(device, a.TopNode); err != nil {
			return nil, nil, err
		}
	case a.Top != nil && *a.Top != h.Nodes.Filename(device):
		if top = h.Nodes.FindBacking(device, *a.Top); top == nil {
			return nil, nil, fmt.Errorf("Top image file %s not found", *a.Top)
		}
	}
	switch {
	case a.BaseNode != nil && a.Base != nil:
		return nil, nil, errors.New("'base-node' and 'base' are mutually exclusive")
	case a.BaseNode != nil:
		if base, err = inChain(top, a.BaseNode); err != nil {
			return nil, nil, err
		}
	case a.Base != nil:
		if base = h.Nodes.FindBacking(top, *a.Base); base == nil {
			return nil, nil, fmt.Errorf("Can't find '%s' in the backing chain", *a.Base)
		}
	default:
		base = chain.Overlay(top, nil)
	}
	for n := top; n != nil && n != chain.Below(base); n = chain.Below(n) {
		if err := n.Blocked(graph.OpCommitTarget); err != nil {
			return nil, nil, err
		}
	}
	if top == base {
		return nil, nil, errors.New("cannot commit an image into itself")
	}
	return top, base, nil
}

// ChangeBackingFile implements types.BlockJobHandler.
func (h BlockJob) ChangeBackingFile(ctx context.Context, a *types.ChangeBackingFileArgs) (err error) {
	var n *graph.Node
	hold, err := h.Graph.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = h.changeBackingNode(a)
		return []*graph.Node{n}, err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	if n.ReadOnly() {
		nodes := n.WithFiles()
		reopen := func(ctx context.Context, readOnly bool) error {
			return h.Jobs.Quiescing(h.Graph, n.NodesBelow, func() error { return h.Graph.SwitchReadOnly(ctx, readOnly, nodes...) })
		}
		if err := reopen(ctx, false); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, reopen(context.WithoutCancel(ctx), true)) }()
	}
	tx := h.Graph.Begin(ctx)
	defer tx.Abort()
	if err := tx.Drain(n); err != nil {
		return err
	}
	tx.Join(&chain.HeaderChange{Node: n, Name: a.BackingFile, Format: n.DriverName()})
	if err = tx.Commit(); err != nil {
		return fmt.Errorf("Could not change backing file to '%s': %s", a.BackingFile, blk.ErrnoText(err))
	}
	return nil
}

// changeBackingNode finds the node whose header change-backing-file changes.
func (h BlockJob) changeBackingNode(a *types.ChangeBackingFileArgs) (*graph.Node, error) {
	device, err := h.Nodes.LookupRoot(a.Device)
	if err != nil {
		return nil, err
	}
	n, err := h.Nodes.Lookup(nil, &a.ImageNodeName)
	switch {
	case err != nil:
		return nil, err
	case n.SkipFilters().Backing() == nil:
		return nil, errors.New("not allowing backing file change on an image without a backing file")
	}
	if err := device.Blocked(graph.OpChange); err != nil {
		return nil, err
	}
	if !chain.Contains(device, n) {
		return nil, fmt.Errorf("'%s' and image file are not in the same chain", a.Device)
	}
	return n, nil
}
