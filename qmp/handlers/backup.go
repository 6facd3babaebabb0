package handlers

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/backup"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockdevBackup implements types.BlockJobHandler: a transaction of one step.
func (h BlockJob) BlockdevBackup(ctx context.Context, a *types.BlockdevBackup) error {
	s := &backupStep{h: h, args: a}
	if err := h.Jobs.Transaction(ctx, h.Graph, s); err != nil {
		return err
	}
	s.job.Settle()
	qmp.AfterReply(ctx, s.job.Release)
	return nil
}

// backupStep is blockdev-backup as a step of a transaction. Its nodes are looked up when it is its turn.
type backupStep struct {
	h    BlockJob
	args *types.BlockdevBackup
	txn  *jobs.Txn
	// drive is set for drive-backup: the target is a file, which opened shows.
	drive  *types.DriveBackup
	opened *blockdev.Opened
	source *graph.Node // that the target is to have as its backing file; nil: as its header says
	found  bool        // both nodes
	done   bool
	job    *backup.Step // nil until it is prepared
}

var _ interface {
	transaction.Action
	transaction.Opener
	transaction.Starter
	transaction.Quiescer
} = (*backupStep)(nil)

// DriveBackup implements types.BlockJobHandler: a transaction of one step.
func (h BlockJob) DriveBackup(ctx context.Context, a *types.DriveBackup) error {
	s := h.driveBackup(a)
	if err := h.Jobs.Transaction(ctx, h.Graph, s); err != nil {
		return err
	}
	s.job.Settle()
	qmp.AfterReply(ctx, s.job.Release)
	return nil
}

func (h BlockJob) driveBackup(a *types.DriveBackup) *backupStep {
	return &backupStep{h: h, drive: a, args: &types.BlockdevBackup{
		JobID: a.JobID, Device: a.Device, Sync: a.Sync, Speed: a.Speed, Bitmap: a.Bitmap, BitmapMode: a.BitmapMode, Compress: a.Compress,
		OnSourceError: a.OnSourceError, OnTargetError: a.OnTargetError, AutoFinalize: a.AutoFinalize, AutoDismiss: a.AutoDismiss,
		FilterNodeName: a.FilterNodeName, XPerf: a.XPerf,
	}}
}

// Open implements transaction.Opener: it makes and opens the file of drive-backup.
func (s *backupStep) Open(ctx context.Context, sketch *graph.Tx) error {
	a := s.drive
	if a == nil {
		return nil
	}
	n, err := s.h.Nodes.LookupIn(sketch, a.Device)
	if err != nil {
		return err
	}
	if err := n.Blocked(graph.OpBackupSource); err != nil {
		return err
	}
	existing := a.Mode != nil && *a.Mode == types.NewImageModeExisting
	format := deref(a.Format)
	if a.Format == nil && !existing {
		format = n.DriverName()
	}
	// What the target shows where the job copies nothing.
	var below *graph.Node
	switch a.Sync {
	case types.MirrorSyncModeTop:
		if below = sketch.BackingChainNext(n); below == nil {
			s.args.Sync = types.MirrorSyncModeFull
		}
	case types.MirrorSyncModeNone:
		below, s.source = n, n
	}
	var made *blockdev.NewImage
	if !existing {
		made = &blockdev.NewImage{Size: n.Size()}
		if below != nil {
			if made.Backing, made.BackingFormat, err = s.h.Nodes.HeaderName(sketch.View, below); err != nil {
				return err
			}
		}
	}
	s.opened, err = s.h.Nodes.OpenImage(ctx, blockdev.OpenImage{New: made,
		Filename: a.Target, Format: format, Backing: s.source == nil, Like: n.Options(), Unmap: true,
	})
	return err
}

// Nodes implements transaction.Action.
func (s *backupStep) Nodes() []*graph.Node {
	source := s.node(s.args.Device)
	if s.drive != nil {
		return source
	}
	return append(source, s.node(s.args.Target)...)
}

// Quiesces implements transaction.Quiescer.
func (s *backupStep) Quiesces() []*graph.Node {
	if !s.found {
		return nil
	}
	return s.node(s.args.Device)
}

func (s *backupStep) node(name string) []*graph.Node {
	n, err := s.h.Nodes.Lookup(&name, &name)
	if err != nil {
		return nil
	}
	return []*graph.Node{n}
}

// Prepare implements transaction.Action.
func (s *backupStep) Prepare(ctx context.Context, tx *graph.Tx) error {
	a := s.args
	s.found = false
	source, err := s.h.Nodes.LookupIn(tx, a.Device)
	if err != nil {
		return err
	}
	target, err := s.target(tx)
	if err != nil {
		return err
	}
	s.found = true
	args := backup.Args{
		ID: deref(a.JobID), Source: source, Target: target, Sync: a.Sync, Compress: deref(a.Compress), Speed: deref(a.Speed),
		OnSourceError: types.BlockdevOnErrorReport, OnTargetError: types.BlockdevOnErrorReport,
		FilterNodeName: a.FilterNodeName, ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss), Txn: s.txn,
		ClosesTarget: s.drive != nil,
	}
	if a.OnSourceError != nil {
		args.OnSourceError = *a.OnSourceError
	}
	if a.OnTargetError != nil {
		args.OnTargetError = *a.OnTargetError
	}
	if err := backupBitmap(&args, a); err != nil {
		return err
	}
	if p := a.XPerf; p != nil {
		args.MaxChunk, args.Buffered = deref(p.MaxChunk), isFalse(p.UseCopyRange)
		args.MaxWorkers = p.MaxWorkers
	}
	s.job = backup.NewStep(s.h.Jobs, args)
	return s.job.Prepare(ctx, tx)
}

// target is the node that is copied to.
func (s *backupStep) target(tx *graph.Tx) (*graph.Node, error) {
	if s.drive == nil {
		return s.h.Nodes.LookupIn(tx, s.args.Target)
	}
	n := s.opened.Node()
	if s.source != nil {
		if !n.Caps().Backing {
			return nil, fmt.Errorf("Driver '%s' of node '%s' does not support backing files", n.DriverName(), n.Name())
		}
		if _, err := tx.Attach(n, "backing", perm.COW, s.source); err != nil {
			return nil, err
		}
	}
	return n, s.opened.Publish(tx)
}

// backupBitmap finds the bitmap and checks that the modes fit together, in the reference's order.
func backupBitmap(args *backup.Args, a *types.BlockdevBackup) error {
	incremental := a.Sync == types.MirrorSyncModeIncremental
	if (incremental || a.Sync == types.MirrorSyncModeBitmap) && a.Bitmap == nil {
		return fmt.Errorf("must provide a valid bitmap name for '%s' sync mode", a.Sync)
	}
	mode := a.BitmapMode
	if incremental {
		success := types.BitmapSyncModeOnSuccess
		if mode != nil && *mode != success {
			return fmt.Errorf("Bitmap sync mode must be '%s' when using sync mode '%s'", success, a.Sync)
		}
		args.Sync, mode = types.MirrorSyncModeBitmap, &success
	}
	if a.Bitmap == nil {
		if mode != nil {
			return errors.New("Cannot specify bitmap sync mode without a bitmap")
		}
		return nil
	}
	if args.Bitmap = args.Source.DirtyBitmap(*a.Bitmap); args.Bitmap == nil {
		return fmt.Errorf("Bitmap '%s' could not be found", *a.Bitmap)
	}
	if mode == nil {
		return errors.New("Bitmap sync mode must be given when providing a bitmap")
	}
	args.BitmapMode = *mode
	if err := args.Bitmap.Check(graph.BitmapRead); err != nil {
		return err
	}
	if args.Sync == types.MirrorSyncModeNone {
		return fmt.Errorf("sync mode '%s' does not produce meaningful bitmap outputs", args.Sync)
	}
	if *mode == types.BitmapSyncModeNever && args.Sync != types.MirrorSyncModeBitmap {
		return fmt.Errorf("Bitmap sync mode '%s' has no meaningful effect when combined with sync mode '%s'", *mode, args.Sync)
	}
	return nil
}

// Commit implements transaction.Action.
func (s *backupStep) Commit() {
	if s.done = true; s.opened != nil {
		s.opened.Done()
	}
	s.job.Commit()
}

// Start implements transaction.Starter.
func (s *backupStep) Start() { s.job.Start() }

// Abort implements transaction.Action.
func (s *backupStep) Abort() {
	if s.job != nil {
		s.job.Abort()
	}
}

// Clean implements transaction.Action.
func (s *backupStep) Clean() {
	if s.opened != nil && !s.done {
		s.opened.Discard()
	}
	if s.job != nil {
		s.job.Clean()
	}
	if !s.done {
		s.opened, s.job, s.source = nil, nil, nil
	}
}
