package backup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Step makes the job as a step of a transaction. Release lets it go on once its command is answered.
type Step struct {
	transaction.Noop
	m        *jobs.Manager
	job      *job
	prepared bool
	started  bool
	release  func()
}

// NewStep makes the step.
func NewStep(m *jobs.Manager, a Args) *Step {
	return &Step{m: m, job: &job{Args: a, g: a.Source.Graph()}}
}

// Nodes implements transaction.Action.
func (s *Step) Nodes() []*graph.Node { return []*graph.Node{s.job.Source, s.job.Target} }

// Prepare implements transaction.Action.
func (s *Step) Prepare(_ context.Context, tx *graph.Tx) (err error) {
	j := s.job
	if err := j.check(); err != nil {
		return err
	}
	// What the graph does not allow is told before the job is announced.
	if err := j.makeFilter(tx); err != nil {
		return fmt.Errorf("Could not create node: %w", err)
	}
	refused := j.insert(tx)
	if refused != nil && len(tx.Parents(j.filter)) > 0 {
		return fmt.Errorf("Could not replace node: %w", refused)
	}
	if err := j.overlaid(tx); err != nil {
		return err
	}
	if c := j.driver.Cluster(); j.MaxChunk > 0 && j.MaxChunk < c {
		return fmt.Errorf("Required max-chunk (%d) is less than backup cluster size (%d)", j.MaxChunk, c)
	}
	j.mj, err = s.m.Create(jobs.Spec{
		ID: j.ID, Type: types.JobTypeBackup, Runner: j, Block: true, Speed: j.Speed, Txn: j.Txn,
		ManualFinalize: j.ManualFinalize, ManualDismiss: j.ManualDismiss,
		Instant: j.Source.Instant() && j.Target.Instant(), Nodes: []*graph.Node{j.filter},
	})
	if err != nil {
		return err
	}
	if refused != nil {
		return refused // in QEMU, by the job as the filter's first parent
	}
	j.driver.OnCopied(j.mj.Count)
	if err = j.attach(tx); err != nil {
		return err
	}
	s.prepared = true
	// From here on: later steps of the transaction find them in use.
	j.block = append(j.block, j.filter.BlockAll(errInUse, graph.OpDataplane), j.Target.BlockAll(errInUse, graph.OpDataplane))
	return nil
}

// Start implements transaction.Starter. The job is paused as long as the nodes are quiet.
func (s *Step) Start() {
	s.job.mj.Hold()
	s.release = s.m.Start(s.job.mj)
	s.started = true
}

// Abort implements transaction.Action.
func (s *Step) Abort() {
	j := s.job
	for _, f := range j.block {
		f()
	}
	j.block = nil
	if j.listed != nil {
		j.listed.Remove()
	}
	if j.frozen {
		j.Bitmap.Reclaim()
		j.frozen = false
	}
	if j.driver != nil {
		_ = j.driver.Close()
	}
	switch {
	case j.mj == nil:
	case s.prepared:
		s.m.Abandon(j.mj)
	default:
		s.m.Discard(j.mj)
	}
}

// Clean implements transaction.Action.
func (s *Step) Clean() {
	if s.started {
		s.job.mj.Unhold()
	}
}

// Settle is jobs.Job.Settle of a started job.
func (s *Step) Settle() {
	if s.started {
		s.job.mj.Settle()
	}
}

// Release lets a started job go on; see jobs.Manager.Start.
func (s *Step) Release() {
	if s.release != nil {
		s.release()
	}
}

// takesCompressed tells whether compressed writes come to a node that compresses: filters only pass them on.
func takesCompressed(n *graph.Node) bool {
	for n.Caps().WriteFlags&blk.Compressed != 0 {
		below := n.FilteredChild()
		if below == nil {
			return true
		}
		n = below.Node()
	}
	return false
}

// check refuses what cannot be backed up, in QEMU's order.
func (j *job) check() error {
	switch {
	case j.Source == j.Target:
		return errors.New("Source and target cannot be the same")
	case j.Compress && !takesCompressed(j.Target):
		return errors.New("Compression is not supported for this drive ") // where QEMU names a device
	}
	if err := j.Source.Blocked(graph.OpBackupSource); err != nil {
		return err
	}
	if err := j.Target.Blocked(graph.OpBackupTarget); err != nil {
		return err
	}
	switch {
	case j.MaxWorkers != nil && (*j.MaxWorkers < 1 || *j.MaxWorkers > math.MaxInt32):
		return fmt.Errorf("max-workers must be between 1 and %d", math.MaxInt32)
	case j.MaxChunk < 0:
		return errors.New("max-chunk must be zero (which means no limit) or positive")
	case j.Bitmap != nil && j.BitmapMode != types.BitmapSyncModeNever:
		if err := j.Bitmap.Check(graph.BitmapChange); err != nil {
			return err
		}
	}
	if rounded(j.Source.Size()) != rounded(j.Target.Size()) {
		return errors.New("Source and target image have different sizes")
	}
	return nil
}

// overlaid refuses a target that an earlier step of the transaction has made the backing file of an
// overlay, which is to find there what it held.
func (j *job) overlaid(tx *graph.Tx) error {
	before := j.Target.Parents()
	for _, e := range tx.Parents(j.Target) {
		if n := e.ParentNode(); n != nil && e.Role()&perm.COW != 0 && !slices.Contains(before, e) {
			return graph.Busy(j.Target.Name(), fmt.Errorf("node is used as backing hd of '%s'", n.Name()))
		}
	}
	return nil
}

func rounded(size int64) int64 { return blk.AlignUp(size, blk.SectorSize) }

// makeFilter makes the filter above the target.
func (j *job) makeFilter(tx *graph.Tx) error {
	name, err := graph.GivenName(j.FilterNodeName)
	if err != nil {
		return err
	}
	source := j.Source.Options()
	filter, err := tx.NewNode(&graph.Options{
		Name: name, DriverName: copybeforewrite.DriverName, Kind: graph.Filter,
		Implicit: name == "", Discard: true, Direct: source.Direct, NoFlush: source.NoFlush,
	})
	if err != nil {
		return err
	}
	j.driver = copybeforewrite.New(filter, j.Source.Size(), copybeforewrite.ClusterSize(j.Target), j.Compress)
	if j.Buffered {
		j.driver.CopyThroughMemory()
	}
	filter.SetDriver(j.driver)
	j.filter = filter
	if _, err := tx.Attach(filter, "target", perm.Data, j.Target); err != nil {
		return err
	}
	return tx.Try()
}

// insert puts the filter above the source.
func (j *job) insert(tx *graph.Tx) error {
	if _, err := tx.InsertFilter(j.filter, "file", j.Source); err != nil {
		return err
	}
	j.driver.TrackReaders(j.Source, j.Target)
	if err := tx.Publish(j.filter); err != nil {
		return err
	}
	return tx.Try()
}

// attach takes what the job relies on, and fixes the point in time: the nodes are quiet.
func (j *job) attach(tx *graph.Tx) (err error) {
	spec := graph.RootSpec{
		EdgeName: "main node", Kind: graph.KindJob, Name: j.mj.ID(), Desc: j.mj.Describe(), StayAtNode: true, Job: true,
		Claim: perm.Claim{Share: perm.All},
	}
	if j.root, err = tx.AttachRoot(spec, j.filter); err != nil {
		return err
	}
	spec.EdgeName = "target"
	if j.hold, err = tx.AttachRoot(spec, j.Target); err != nil {
		return err
	}
	pending := j.driver.Pending()
	if j.Bitmap != nil {
		j.Bitmap.Freeze()
		j.frozen = true
	}
	if j.listed, err = j.Source.NewDirtyBitmap(graph.DirtyBitmapSpec{Bits: pending, Disabled: true}); err != nil {
		return err
	}
	if j.Sync == types.MirrorSyncModeBitmap {
		pending.Merge(j.Bitmap.Bits())
	} else {
		pending.SetAll()
	}
	j.driver.Access().SetAll()
	j.idle = pending.Empty()
	return nil
}
