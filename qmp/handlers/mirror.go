package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs/mirror"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockdevMirror implements types.BlockJobHandler.
func (h BlockJob) BlockdevMirror(ctx context.Context, a *types.BlockdevMirrorArgs) error {
	var source, target *graph.Node
	hold, err := h.Graph.Hold(ctx, func() (_ []*graph.Node, err error) {
		if source, err = h.Nodes.LookupRoot(a.Device); err != nil {
			return nil, err
		}
		if target, err = h.Nodes.Lookup(&a.Target, &a.Target); err != nil {
			return nil, err
		}
		return append(h.replaced(deref(a.Replaces)), source, target), nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	filter, err := graph.GivenName(a.FilterNodeName)
	if err != nil {
		return err
	}
	if a.Replaces != nil && *a.Replaces == "" {
		return errors.New("Failed to find node with node-name=''")
	}
	args := mirror.Args{
		Hold: hold, ID: deref(a.JobID), Source: source, Target: target, Replaces: deref(a.Replaces), ZeroTarget: a.Sync == types.MirrorSyncModeFull,
		Speed: deref(a.Speed), Granularity: int64(deref(a.Granularity)), BufSize: deref(a.BufSize), Unmap: true,
		FilterNodeName: filter, ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss),
	}
	mirrorDefaults(&args, a.OnSourceError, a.OnTargetError, a.CopyMode)
	return h.startMirror(ctx, args, a.Sync)
}

func mirrorDefaults(args *mirror.Args, onSource, onTarget *types.BlockdevOnError, mode *types.MirrorCopyMode) {
	args.Type = types.JobTypeMirror
	args.OnSourceError, args.OnTargetError, args.CopyMode = types.BlockdevOnErrorReport, types.BlockdevOnErrorReport, types.MirrorCopyModeBackground
	if onSource != nil {
		args.OnSourceError = *onSource
	}
	if onTarget != nil {
		args.OnTargetError = *onTarget
	}
	if mode != nil {
		args.CopyMode = *mode
	}
}

// startMirror checks what the two commands have in common, in QEMU's order, and starts the
// job.
func (h BlockJob) startMirror(ctx context.Context, a mirror.Args, sync types.MirrorSyncMode) error {
	switch g := a.Granularity; {
	case g != 0 && (g < graph.MinGranularity || g > 64<<20):
		return errors.New("Parameter 'granularity' expects a value in range [512B, 64MB]")
	case g&(g-1) != 0:
		return errors.New("Parameter 'granularity' expects a power of 2")
	}
	if err := a.Source.Blocked(graph.OpMirrorSource); err != nil {
		return err
	}
	if err := a.Target.Blocked(graph.OpMirrorTarget); err != nil {
		return err
	}
	below := graph.Now.BackingChainNext(a.Source)
	if sync == types.MirrorSyncModeTop && below == nil {
		sync = types.MirrorSyncModeFull
	}
	if n := a.Source.SkipImplicitFilters(); a.Replaces == "" && n != a.Source {
		a.Replaces = n.Name()
	}
	if a.Replaces != "" {
		if err := h.checkReplaces(a.Source, a.Replaces); err != nil {
			return err
		}
	}
	switch sync {
	case types.MirrorSyncModeIncremental, types.MirrorSyncModeBitmap:
		return fmt.Errorf("Sync mode '%s' not supported", sync)
	case types.MirrorSyncModeTop:
		a.Base = below
	case types.MirrorSyncModeNone:
		a.None = true
	}
	release, err := mirror.Start(ctx, h.Jobs, a)
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}

// replaced is the node that a mirror is to replace, if there is one of that name.
func (h BlockJob) replaced(name string) []*graph.Node {
	if n := h.Graph.Node(name); n != nil {
		return []*graph.Node{n}
	}
	return nil
}

// checkReplaces tells why a mirror of source cannot take the place of the node of that name.
func (h BlockJob) checkReplaces(source *graph.Node, name string) error {
	n := h.Graph.Node(name)
	if n == nil {
		return fmt.Errorf("Failed to find node with node-name='%s'", name)
	}
	if err := n.Blocked(graph.OpReplace); err != nil {
		return err
	}
	if !mirror.CanReplace(source, n) {
		return fmt.Errorf("Cannot replace '%s' by a node mirrored from '%s', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data",
			name, source.Name())
	}
	if n.Size() != source.Size() {
		return errors.New("cannot replace image with a mirror image of different size")
	}
	return nil
}

// DriveMirror implements types.BlockJobHandler.
func (h BlockJob) DriveMirror(ctx context.Context, a *types.DriveMirror) error {
	var source *graph.Node
	hold, err := h.Graph.Hold(ctx, func() (_ []*graph.Node, err error) {
		if source, err = h.Nodes.LookupRoot(a.Device); err != nil {
			return nil, err
		}
		return append(h.replaced(deref(a.Replaces)), source), source.Blocked(graph.OpMirrorSource)
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	existing := a.Mode != nil && *a.Mode == types.NewImageModeExisting
	var backing *graph.Node // of the target
	if e := source.SkipFilters().Backing(); e != nil {
		backing = e.Node()
	}
	sync := a.Sync
	switch {
	case sync == types.MirrorSyncModeTop && backing == nil:
		sync = types.MirrorSyncModeFull
	case sync == types.MirrorSyncModeNone:
		backing = source
	}
	if a.Replaces != nil && a.NodeName == nil {
		return errors.New("a node-name must be provided when replacing a named node of the graph")
	}
	name, err := graph.GivenName(a.NodeName)
	if err != nil {
		return err
	}
	if sync == types.MirrorSyncModeFull {
		backing = nil
	}
	opened, err := h.Nodes.OpenImage(ctx, blockdev.OpenImage{
		Filename: a.Target, Mode: a.Mode, Format: a.Format, Name: name, For: source, Below: backing, View: graph.Now,
	})
	if err != nil {
		return err
	}
	target := opened.Node()
	args := mirror.Args{
		Hold: hold, ID: deref(a.JobID), Source: source, Target: target, Replaces: deref(a.Replaces),
		ZeroTarget: sync == types.MirrorSyncModeFull && (existing || !target.Caps().ZeroInit),
		Speed:      deref(a.Speed), Granularity: int64(deref(a.Granularity)), BufSize: deref(a.BufSize), Unmap: !isFalse(a.Unmap),
		ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss), Publish: opened.Publish,
		Rebase: func(ctx context.Context, tx *graph.Tx) (func(bool), error) {
			if existing {
				return h.openBacking(ctx, tx, target.SkipFilters())
			}
			return func(bool) {}, setBacking(tx, target.SkipFilters(), backing)
		},
	}
	mirrorDefaults(&args, a.OnSourceError, a.OnTargetError, a.CopyMode)
	if err := h.startMirror(ctx, args, sync); err != nil {
		opened.Discard()
		return err
	}
	opened.Done()
	return nil
}

// setBacking lets tx give n a backing node, or none.
func setBacking(tx *graph.Tx, n, backing *graph.Node) error {
	e := tx.Child(n, "backing")
	switch {
	case e == nil && backing == nil:
		return nil
	case backing == nil:
		return tx.Detach(e)
	case e == nil:
		_, err := tx.Attach(n, "backing", perm.COW, backing)
		return err
	}
	return tx.Replace(e, backing)
}

// openBacking opens the backing file that n's header names, if any, and lets tx attach it.
func (h BlockJob) openBacking(ctx context.Context, tx *graph.Tx, n *graph.Node) (end func(bool), err error) {
	if n.Backing() != nil {
		return func(bool) {}, nil
	}
	opened, err := h.Nodes.OpenBacking(ctx, n)
	if err != nil || opened == nil {
		return func(bool) {}, err
	}
	_, err = tx.Attach(n, "backing", perm.COW, opened.Node())
	if err == nil {
		err = opened.Publish(tx)
	}
	if err != nil {
		opened.Discard()
		return nil, err
	}
	return func(committed bool) {
		if committed {
			opened.Done()
		} else {
			opened.Discard()
		}
	}, nil
}

// BlockJobChange implements types.BlockJobHandler.
func (h BlockJob) BlockJobChange(_ context.Context, a *types.BlockJobChangeOptions) error {
	j, err := h.find(a.ID)
	if err != nil {
		return err
	}
	o, ok := a.U.(*types.BlockJobChangeOptionsMirror)
	if !ok || j.Type() != a.Type {
		return errors.New("Job type does not support change")
	}
	return j.ChangeCopyMode(o.CopyMode)
}
