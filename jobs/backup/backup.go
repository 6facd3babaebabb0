// Package backup is the job behind blockdev-backup: it copies a node, as it is when the job starts, to a target while guests go on writing.
//
//	 before        while it runs                               after
//
//	parents        parents      job                            parents
//	   |              |        /                                  |
//	 source      copy-before-write ---------- target            source     target
//	                  | file
//	               source
//
// The filter copies what guests are about to overwrite, the job the rest; package copybeforewrite keeps the two apart.
package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"

	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

// workers copy extents at the same time where nobody says how many, mostWorkers at most. A worker takes up to copybeforewrite.MaxCopy of memory.
const (
	workers     = 2
	mostWorkers = 64
)

// Args says what to back up. Source, Target and Bitmap were looked up by the caller, who has checked that the modes fit together.
type Args struct {
	ID             string
	Source, Target *graph.Node
	Sync           types.MirrorSyncMode // not incremental
	Bitmap         *graph.DirtyBitmap   // nil: none
	BitmapMode     types.BitmapSyncMode
	Compress       bool
	Speed          int64 // bytes per second, 0: no limit
	OnSourceError  types.BlockdevOnError
	OnTargetError  types.BlockdevOnError
	FilterNodeName *string // nil: generated, and the filter is implicit
	ManualFinalize bool
	ManualDismiss  bool
	Buffered       bool      // data go through memory
	MaxWorkers     *int64    // nil: as many as are good
	MaxChunk       int64     // bytes; 0: as the filter copies at most
	Txn            *jobs.Txn // nil: the job stands alone
	// ClosesTarget: the target's node goes with the job, and nobody else can flush it.
	ClosesTarget bool
}

// errInUse is why the nodes of a job take no other operation.
var errInUse = errors.New("block device is in use by block job: backup")

// job is the runner.
type job struct {
	Args
	g      *graph.Graph
	filter *graph.Node // nil once removed
	driver *copybeforewrite.Driver
	root   *graph.Root        // of the job's requests
	hold   *graph.Root        // on the target
	listed *graph.DirtyBitmap // what is to do, as clients see it on the source
	frozen bool               // the bitmap is
	alone  bool               // what the target does not hold are zeroes for good
	idle   bool               // nothing was to do when the job was made
	ok     bool
	lost   bool // the target could not be flushed: nobody knows what of it is on stable storage
	block  []func()
}

// Step makes the job as a step of a transaction (jobs.Action). Release lets it go on once its command is answered.
type Step struct {
	m *jobs.Manager
	*job
	mj       *jobs.Job
	prepared bool
	started  bool
	release  func()
}

// NewStep makes the step.
func NewStep(m *jobs.Manager, a Args) *Step {
	return &Step{m: m, job: &job{Args: a, g: a.Source.Graph()}}
}

// Nodes implements jobs.Action.
func (s *Step) Nodes() []*graph.Node { return []*graph.Node{s.Source, s.Target} }

// Prepare implements jobs.Action.
func (s *Step) Prepare(_ context.Context, tx *graph.Tx) (err error) {
	if err := s.check(); err != nil {
		return err
	}
	// What the graph does not allow is told before the job is announced.
	if err := s.makeFilter(tx); err != nil {
		return fmt.Errorf("Could not create node: %w", err)
	}
	refused := s.insert(tx)
	if refused != nil && len(tx.Parents(s.filter)) > 0 {
		return fmt.Errorf("Could not replace node: %w", refused)
	}
	if err := s.overlaid(tx); err != nil {
		return err
	}
	if c := s.driver.Cluster(); s.MaxChunk > 0 && s.MaxChunk < c {
		return fmt.Errorf("Required max-chunk (%d) is less than backup cluster size (%d)", s.MaxChunk, c)
	}
	s.mj, err = s.m.Create(jobs.Spec{
		ID: s.ID, Type: types.JobTypeBackup, Runner: s.job, Block: true, Speed: s.Speed, Txn: s.Txn,
		ManualFinalize: s.ManualFinalize, ManualDismiss: s.ManualDismiss,
		Instant: s.Source.Instant() && s.Target.Instant(), Nodes: []*graph.Node{s.filter},
	})
	if err != nil {
		return err
	}
	if refused != nil {
		return refused // in the reference, by the job as the filter's first parent
	}
	s.driver.OnCopied(s.mj.Count)
	if err = s.attach(tx); err != nil {
		return err
	}
	s.prepared = true
	// From here on: later steps of the transaction find them in use.
	s.block = append(s.block, s.filter.BlockAll(errInUse, graph.OpDataplane), s.Target.BlockAll(errInUse, graph.OpDataplane))
	return nil
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

// check refuses what cannot be backed up, in the reference's order.
func (s *Step) check() error {
	switch {
	case s.Source == s.Target:
		return errors.New("Source and target cannot be the same")
	case s.Compress && !takesCompressed(s.Target):
		return errors.New("Compression is not supported for this drive ") // where the reference names a device
	}
	if err := s.Source.Blocked(graph.OpBackupSource); err != nil {
		return err
	}
	if err := s.Target.Blocked(graph.OpBackupTarget); err != nil {
		return err
	}
	switch {
	case s.MaxWorkers != nil && (*s.MaxWorkers < 1 || *s.MaxWorkers > math.MaxInt32):
		return fmt.Errorf("max-workers must be between 1 and %d", math.MaxInt32)
	case s.MaxChunk < 0:
		return errors.New("max-chunk must be zero (which means no limit) or positive")
	case s.Bitmap != nil && s.BitmapMode != types.BitmapSyncModeNever:
		if err := s.Bitmap.Check(graph.BitmapChange); err != nil {
			return err
		}
	}
	if rounded(s.Source.Size()) != rounded(s.Target.Size()) {
		return errors.New("Source and target image have different sizes")
	}
	return nil
}

// overlaid refuses a target that an earlier step of the transaction has made the backing file of an overlay, which is to find there what it held.
func (s *Step) overlaid(tx *graph.Tx) error {
	before := s.Target.Parents()
	for _, e := range tx.Parents(s.Target) {
		if n := e.ParentNode(); n != nil && e.Role()&perm.COW != 0 && !slices.Contains(before, e) {
			return &graph.BusyError{Node: s.Target.Name(), Reason: fmt.Errorf("node is used as backing hd of '%s'", n.Name())}
		}
	}
	return nil
}

func rounded(size int64) int64 { return blk.AlignUp(size, 512) }

// makeFilter makes the filter above the target.
func (s *Step) makeFilter(tx *graph.Tx) error {
	name, err := graph.GivenName(s.FilterNodeName)
	if err != nil {
		return err
	}
	source := s.Source.Options()
	filter, err := tx.NewNode(&graph.Options{
		Name: name, DriverName: copybeforewrite.DriverName, Kind: graph.Filter,
		Implicit: name == "", Discard: true, Direct: source.Direct, NoFlush: source.NoFlush,
	})
	if err != nil {
		return err
	}
	s.driver = copybeforewrite.New(filter, s.Source.Size(), copybeforewrite.ClusterSize(s.Target), s.Compress)
	if s.Buffered {
		s.driver.CopyThroughMemory()
	}
	filter.SetDriver(s.driver)
	s.filter = filter
	if _, err := tx.Attach(filter, "target", perm.Data, s.Target); err != nil {
		return err
	}
	return tx.Try()
}

// insert puts the filter above the source.
func (s *Step) insert(tx *graph.Tx) error {
	if _, err := tx.InsertFilter(s.filter, "file", s.Source); err != nil {
		return err
	}
	s.driver.TrackReaders(s.Source, s.Target)
	if err := tx.Publish(s.filter); err != nil {
		return err
	}
	return tx.Try()
}

// attach takes what the job relies on, and fixes the point in time: the nodes are quiet.
func (s *Step) attach(tx *graph.Tx) (err error) {
	spec := graph.RootSpec{
		EdgeName: "main node", Kind: graph.KindJob, Name: s.mj.ID(), Desc: s.mj.Describe(), StayAtNode: true, Job: true,
		Claim: perm.Claim{Share: perm.All},
	}
	if s.root, err = tx.AttachRoot(spec, s.filter); err != nil {
		return err
	}
	spec.EdgeName = "target"
	if s.hold, err = tx.AttachRoot(spec, s.Target); err != nil {
		return err
	}
	pending := s.driver.Pending()
	if s.Bitmap != nil {
		s.Bitmap.Freeze()
		s.frozen = true
	}
	if s.listed, err = s.Source.NewDirtyBitmap(graph.DirtyBitmapSpec{Bits: pending, Disabled: true}); err != nil {
		return err
	}
	if s.Sync == types.MirrorSyncModeBitmap {
		pending.Merge(s.Bitmap.Bits())
	} else {
		pending.SetAll()
	}
	s.driver.Access().SetAll()
	s.idle = pending.Empty()
	return nil
}

// Commit implements jobs.Action.
func (s *Step) Commit() {}

// Start implements jobs.Starter. The job is paused as long as the nodes are quiet.
func (s *Step) Start() {
	s.mj.Hold()
	s.release = s.m.Start(s.mj)
	s.started = true
}

// Abort implements jobs.Action.
func (s *Step) Abort() {
	for _, f := range s.block {
		f()
	}
	s.block = nil
	if s.listed != nil {
		s.listed.Remove()
	}
	if s.frozen {
		s.Bitmap.Reclaim()
		s.frozen = false
	}
	if s.driver != nil {
		_ = s.driver.Close()
	}
	switch {
	case s.mj == nil:
	case s.prepared:
		s.m.Abandon(s.mj)
	default:
		s.m.Discard(s.mj)
	}
}

// Clean implements jobs.Action.
func (s *Step) Clean() {
	if s.started {
		s.mj.Unhold()
	}
}

// Settle is jobs.Job.Settle of a started job.
func (s *Step) Settle() {
	if s.started {
		s.mj.Settle()
	}
}

// Release lets a started job go on; see jobs.Manager.Start.
func (s *Step) Release() {
	if s.release != nil {
		s.release()
	}
}

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	j.driver.Remaining(h.SetRemaining)
	if j.idle && j.Sync != types.MirrorSyncModeNone {
		return nil // else guests may have copied already, or be copying, what there is
	}
	h.Yield()
	if j.Sync == types.MirrorSyncModeNone {
		return h.Idle()
	}
	if j.Sync == types.MirrorSyncModeTop {
		if err := j.skipUnallocated(ctx, h); err != nil {
			return err
		}
	}
	// Only of a full copy it is known that nothing will be put below it.
	j.alone = j.Sync == types.MirrorSyncModeFull && chain.StandsAlone(j.Target)
	t := copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: j.Source.Size(), Chunk: copybeforewrite.MaxCopy, Workers: workers,
		Copy: j.copy, LongZeroes: true, Guests: j.driver.Guests(), Side: j.side, Uncounted: true, RetryIgnored: true,
	}
	if j.MaxChunk > 0 {
		t.Chunk = min(t.Chunk, blk.AlignDown(j.MaxChunk, j.driver.Cluster()))
	}
	t.Chunk = max(t.Chunk, j.driver.Cluster())
	if j.MaxWorkers != nil {
		t.Workers = int(min(mostWorkers, *j.MaxWorkers))
	}
	t.Look = func(r *blk.Req, off, _ int64) (copy.Extent, error) { return j.look(h, r, off, t.Chunk) }
	for {
		if err := copy.Run(h, t); err != nil {
			return err
		}
		// What guests are copying was passed over, and is to do again where that fails.
		if err := j.driver.WaitCopies(ctx); err != nil {
			return err
		}
		if j.driver.Over() {
			break
		}
	}
	if !j.ClosesTarget && (j.Bitmap == nil || j.BitmapMode == types.BitmapSyncModeNever) {
		return nil
	}
	return j.flush(ctx, h)
}

// flush puts the target on stable storage before the bitmap forgets what is in it, or before it is closed: what fails then nobody is told. Other backups
// get there when their users flush the target. Where the policy ignores that it fails, the job succeeds and the bitmap forgets nothing.
func (j *job) flush(ctx context.Context, h *jobs.Handle) error {
	for {
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		err = j.filter.Child("target").Flush(r)
		j.root.End(r)
		if err == nil {
			return nil
		}
		switch h.OnError(types.IoOperationTypeWrite, j.OnTargetError, err) {
		case types.BlockErrorActionReport:
			j.lost = true
			return err
		case types.BlockErrorActionIgnore:
			j.lost = true
			return nil
		}
		if err := h.Checkpoint(); err != nil {
			return err
		}
	}
}

// look tells the copy engine what is to do from off on, where a cluster begins.
func (j *job) look(h *jobs.Handle, r *blk.Req, off, chunk int64) (copy.Extent, error) {
	size := j.Source.Size()
	at, k, ok := j.driver.Pending().NextDirty(off, size)
	switch {
	case !ok:
		return copy.Extent{N: size - off}, nil
	case at > off:
		return copy.Extent{N: at - off}, nil
	}
	if k > chunk && j.alone && !h.Limited() {
		if n := j.driver.SameZeroes(r, off, k); n > chunk {
			return copy.Extent{N: n, Action: copy.Zero}, nil
		}
	}
	return copy.Extent{N: min(k, chunk), Action: copy.Data}, nil
}

func (j *job) copy(r *blk.Req, off int64, e copy.Extent) (int64, error) {
	if e.Action == copy.Zero {
		return j.driver.SkipZeroes(r, off, e.N), nil
	}
	return j.driver.CopyCounting(r, off, e.N)
}

// side tells reading errors from writing errors.
func (j *job) side(err error) (types.IoOperationType, types.BlockdevOnError) {
	var c *graph.CopyError
	if errors.As(err, &c) && c.Write {
		return types.IoOperationTypeWrite, j.OnTargetError
	}
	return types.IoOperationTypeRead, j.OnSourceError
}

// skipUnallocated takes off the list what the source itself does not hold.
func (j *job) skipUnallocated(ctx context.Context, h *jobs.Handle) error {
	c, top := j.driver.Cluster(), j.Source.SkipFilters()
	from := int64(0) // what the source does not hold goes from here to off
	for off, size := int64(0), j.Source.Size(); off < size; {
		if err := h.Checkpoint(); err != nil {
			return err
		}
		r, err := j.root.Begin(ctx)
		if err != nil {
			return err
		}
		x, err := j.filter.FilteredChild().StatusAbove(r, top, true, off, size-off)
		j.root.End(r)
		if err != nil {
			return err
		}
		if x.N == 0 {
			break
		}
		if off += x.N; x.Allocated {
			off = min(blk.AlignUp(off, c), size)
			from = off
			continue
		}
		lo, hi := blk.AlignUp(from, c), blk.AlignDown(off, c)
		if off == size {
			hi = size
		}
		if lo < hi {
			j.driver.Skip(lo, hi-lo)
			from = hi
			j.driver.Remaining(h.SetRemaining)
		}
	}
	return nil
}

// Commit implements jobs.Committer.
func (j *job) Commit(*jobs.Handle) { j.ok = true }

// Clean implements jobs.Cleaner: the filter goes, the bitmap is handed over.
func (j *job) Clean(h *jobs.Handle) {
	if !j.ok {
		j.settle(h)
	}
	if hold, err := j.g.HoldNodes(context.Background(), j.Source); err == nil {
		defer hold.Release()
	}
	for _, f := range j.block {
		f()
	}
	j.block = nil
	undrain, err := j.g.Drain(context.Background(), j.Source)
	if err == nil {
		defer undrain()
	} else {
		j.lost = true
	}
	j.listed.Remove()
	j.endBitmap()
	_ = j.driver.Stop(context.Background()) // who stays at the filter does so without the job
	chain.TakeOut(j.ID, j.filter, nil, j.leave)
	h.Quiesced(1, j.Source)
}

// settle puts what a job that has failed has copied so far on stable storage, if its bitmap is to forget that. Guests go on meanwhile, and do not copy any
// more.
func (j *job) settle(h *jobs.Handle) {
	if !j.frozen || j.BitmapMode != types.BitmapSyncModeAlways || j.lost {
		return
	}
	err := j.driver.Stop(context.Background())
	if err == nil && !j.driver.Copied().Empty() {
		// Without a unit of work: nobody waits for a gate here.
		err = j.filter.Child("target").Flush(&blk.Req{Ctx: context.Background(), Job: true})
	}
	if err != nil {
		j.lost = true
		slog.Warn("a backup that failed cannot flush its target; its bitmap keeps everything", "job", h.Job().ID(), "err", err)
	}
}

// leave lets tx give back what the job relies on, the target as well: the filter copies nothing any more.
func (j *job) leave(tx *graph.Tx) error {
	if err := errors.Join(tx.DetachRoot(j.root), tx.DetachRoot(j.hold)); err != nil {
		return err
	}
	if e := j.filter.Child("target"); e != nil {
		return tx.Detach(e)
	}
	return nil
}

// endBitmap lets the bitmap record what the next backup needs: what was written since this one, and, where this one does not count,
// what was recorded before. It forgets only what is on stable storage in the target. The source is quiet.
func (j *job) endBitmap() {
	if !j.frozen {
		return
	}
	j.frozen = false
	bits, counts := j.Bitmap.Bits(), j.ok || j.BitmapMode == types.BitmapSyncModeAlways
	switch {
	case j.BitmapMode == types.BitmapSyncModeNever || !counts:
		j.Bitmap.Reclaim()
		return
	case j.lost:
		j.Bitmap.Reclaim()
		bits.Merge(j.driver.Copied())
	default:
		j.Bitmap.Abdicate()
	}
	bits.Merge(j.driver.Pending()) // nothing, if it has succeeded
}
