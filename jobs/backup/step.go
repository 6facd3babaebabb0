package backup

import (
	"context"
	"errors"
	"fmt"
	"math"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/schema/types"
)

// Step is blockdev-backup or drive-backup as a step of a transaction: it makes a job, which Release
// lets go on once its command is answered.
type Step struct {
	m     *jobs.Manager
	nodes *blockdev.Manager
	txn   *jobs.Txn // nil: the job stands alone
	args  types.BlockdevBackup
	drive *types.DriveBackup // nil: blockdev-backup
	// closes: the target's node goes with the job.
	closes bool

	job     *job             // nil until its nodes are found
	opened  *blockdev.Opened // the target of drive-backup
	below   *graph.Node      // that the target is to have as its backing file; nil: as its header says
	sync    types.MirrorSyncMode
	found   bool // the nodes, in the last attempt
	done    bool
	release func() // nil: it was not started
}

var _ interface {
	transaction.Action
	transaction.Opener
	transaction.Starter
	transaction.Quiescer
} = (*Step)(nil)

// FromArgs makes the step of blockdev-backup.
func FromArgs(nodes *blockdev.Manager, m *jobs.Manager, a *types.BlockdevBackup) *Step {
	return &Step{m: m, nodes: nodes, args: *a}
}

// FromDriveArgs makes the step of drive-backup, whose target is a file.
func FromDriveArgs(nodes *blockdev.Manager, m *jobs.Manager, a *types.DriveBackup) *Step {
	return &Step{m: m, nodes: nodes, drive: a, closes: true, args: types.BlockdevBackup{
		JobID: a.JobID, Device: a.Device, Sync: a.Sync, Speed: a.Speed, Bitmap: a.Bitmap, BitmapMode: a.BitmapMode,
		Compress: a.Compress, OnSourceError: a.OnSourceError, OnTargetError: a.OnTargetError,
		AutoFinalize: a.AutoFinalize, AutoDismiss: a.AutoDismiss, FilterNodeName: a.FilterNodeName, XPerf: a.XPerf,
		DiscardSource: a.DiscardSource,
	}}
}

// Join makes the job one of a transaction of jobs.
func (s *Step) Join(t *jobs.Txn) { s.txn = t }

// Open implements transaction.Opener: it makes and opens the file of drive-backup.
func (s *Step) Open(ctx context.Context, sketch *graph.Tx) error {
	a := s.drive
	if s.sync = s.args.Sync; a == nil {
		return nil
	}
	n, err := s.nodes.LookupIn(sketch, a.Device)
	if err != nil {
		return err
	}
	if err := n.Blocked(graph.OpBackupSource); err != nil {
		return err
	}
	i := blockdev.OpenImage{Filename: a.Target, Mode: a.Mode, Format: a.Format, For: n, View: sketch.View, Unmap: true}
	// Below is what the target shows where the job copies nothing.
	switch a.Sync {
	case types.MirrorSyncModeTop:
		if i.Below = sketch.BackingChainNext(n); i.Below == nil {
			s.sync = types.MirrorSyncModeFull
		}
	case types.MirrorSyncModeNone:
		i.Below, s.below = n, n
	}
	i.Backing = s.below == nil
	s.opened, err = s.nodes.OpenImage(ctx, i)
	return err
}

// Nodes implements transaction.Action.
func (s *Step) Nodes() []*graph.Node {
	source := s.node(s.args.Device)
	if s.drive != nil {
		return source
	}
	return append(source, s.node(s.args.Target)...)
}

// Quiesces implements transaction.Quiescer.
func (s *Step) Quiesces() []*graph.Node {
	if !s.found {
		return nil
	}
	return s.node(s.args.Device)
}

func (s *Step) node(name string) []*graph.Node {
	n, err := s.nodes.Lookup(&name, &name)
	if err != nil {
		return nil
	}
	return []*graph.Node{n}
}

// Prepare implements transaction.Action.
func (s *Step) Prepare(_ context.Context, tx *graph.Tx) error {
	s.found = false
	source, err := s.nodes.LookupIn(tx, s.args.Device)
	if err != nil {
		return err
	}
	target, err := s.target(tx)
	if err != nil {
		return err
	}
	s.found = true
	s.job = &job{
		args: s.args, source: source, target: target, closesTarget: s.closes, patience: blockjob.NewPatience(),
	}
	s.job.args.Sync, s.job.args.Target = s.sync, target.Name()
	if err := s.job.findBitmap(); err != nil {
		return err
	}
	return s.job.enter(tx, s.m, s.txn)
}

// target is the node that is copied to.
func (s *Step) target(tx *graph.Tx) (*graph.Node, error) {
	if s.drive == nil {
		return s.nodes.LookupIn(tx, s.args.Target)
	}
	n := s.opened.Node()
	if s.below != nil {
		if !n.Caps().Backing {
			return nil, fmt.Errorf("Driver '%s' of node '%s' does not support backing files", n.DriverName(), n.Name())
		}
		if _, err := tx.Attach(n, "backing", perm.COW, s.below); err != nil {
			return nil, err
		}
	}
	return n, s.opened.Publish(tx)
}

// findBitmap finds the bitmap and checks that the modes fit together, in QEMU's order.
func (j *job) findBitmap() error {
	a := &j.args
	incremental := a.Sync == types.MirrorSyncModeIncremental
	if (incremental || a.Sync == types.MirrorSyncModeBitmap) && a.Bitmap == nil {
		return fmt.Errorf("must provide a valid bitmap name for '%s' sync mode", a.Sync)
	}
	if incremental {
		success := types.BitmapSyncModeOnSuccess
		if a.BitmapMode != nil && *a.BitmapMode != success {
			return fmt.Errorf("Bitmap sync mode must be '%s' when using sync mode '%s'", success, a.Sync)
		}
		a.Sync, a.BitmapMode = types.MirrorSyncModeBitmap, &success
	}
	if a.Bitmap == nil {
		if a.BitmapMode != nil {
			return errors.New("Cannot specify bitmap sync mode without a bitmap")
		}
		return nil
	}
	if j.bitmap = j.source.Bitmaps().Find(*a.Bitmap); j.bitmap == nil {
		return fmt.Errorf("Bitmap '%s' could not be found", *a.Bitmap)
	}
	if a.BitmapMode == nil {
		return errors.New("Bitmap sync mode must be given when providing a bitmap")
	}
	j.bitmapMode = *a.BitmapMode
	if err := j.bitmap.Check(graph.BitmapRead); err != nil {
		return err
	}
	if a.Sync == types.MirrorSyncModeNone {
		return fmt.Errorf("sync mode '%s' does not produce meaningful bitmap outputs", a.Sync)
	}
	if j.bitmapMode == types.BitmapSyncModeNever && a.Sync != types.MirrorSyncModeBitmap {
		return fmt.Errorf("Bitmap sync mode '%s' has no meaningful effect when combined with sync mode '%s'",
			j.bitmapMode, a.Sync)
	}
	return nil
}

// check refuses what cannot be backed up, in QEMU's order.
func (j *job) check() error {
	switch {
	case j.source == j.target:
		return errors.New("Source and target cannot be the same")
	case types.Or(j.args.Compress, false) && !takesCompressed(j.target):
		return errors.New("Compression is not supported for this drive ") // where QEMU names a device
	}
	if err := j.source.Blocked(graph.OpBackupSource); err != nil {
		return err
	}
	if err := j.target.Blocked(graph.OpBackupTarget); err != nil {
		return err
	}
	p := j.perf()
	switch {
	case p.MaxWorkers != nil && (*p.MaxWorkers < 1 || *p.MaxWorkers > math.MaxInt32):
		return fmt.Errorf("max-workers must be between 1 and %d", math.MaxInt32)
	case types.Or(p.MinClusterSize, 0) > math.MaxInt64:
		return fmt.Errorf("min-cluster-size too large: %d > %d", *p.MinClusterSize, math.MaxInt64)
	case types.Or(p.MaxChunk, 0) < 0:
		return errors.New("max-chunk must be zero (which means no limit) or positive")
	case j.bitmap != nil && j.bitmapMode != types.BitmapSyncModeNever:
		if err := j.bitmap.Check(graph.BitmapChange); err != nil {
			return err
		}
	}
	if blk.AlignUp(j.source.Size(), blk.SectorSize) != blk.AlignUp(j.target.Size(), blk.SectorSize) {
		return errors.New("Source and target image have different sizes")
	}
	if _, ok := j.source.SkipFilters().Driver().(graph.ChildKeeper); !ok && types.Or(j.args.DiscardSource, false) {
		return fmt.Errorf("Node '%s' keeps no point in time: 'discard-source' would take away what its users have",
			j.source.Name())
	}
	return nil
}

// Commit implements transaction.Action.
func (s *Step) Commit() {
	if s.done = true; s.opened != nil {
		s.opened.Done()
	}
}

// Start implements transaction.Starter. The job is paused as long as the nodes are quiet.
func (s *Step) Start() {
	s.job.site.Job.Quiesce()
	s.release = s.m.Start(s.job.site.Job)
}

// Abort implements transaction.Action.
func (s *Step) Abort() {
	if s.job != nil {
		s.job.abort(s.m)
	}
}

// Clean implements transaction.Action.
func (s *Step) Clean() {
	if s.release != nil {
		s.job.site.Job.Unquiesce()
	}
	if s.done {
		return
	}
	if s.opened != nil {
		s.opened.Discard()
	}
	s.opened, s.job, s.below = nil, nil, nil
}

// Settle is jobs.Job.Settle of a job that was started.
func (s *Step) Settle() {
	if s.release != nil {
		s.job.site.Job.Settle()
	}
}

// Release lets a job that was started go on; see jobs.Manager.Start.
func (s *Step) Release() {
	if s.release != nil {
		s.release()
	}
}
