package backup

import (
	"errors"
	"fmt"
	"slices"

	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// enter checks the job, creates it, and puts it into the graph by tx.
func (j *job) enter(tx *graph.Tx, m *jobs.Manager, txn *jobs.Txn) error {
	if err := j.check(); err != nil {
		return err
	}
	// What the graph does not allow is told before the job is announced.
	if err := j.makeFilter(tx); err != nil {
		return fmt.Errorf("Could not create node: %w", err)
	}
	refused := j.insert(tx)
	var away *graph.InactiveChildError
	if errors.As(refused, &away) || refused != nil && len(tx.Parents(j.site.Filter)) == 0 {
		return fmt.Errorf("Could not create node: %w", refused)
	}
	if refused != nil {
		return fmt.Errorf("Could not replace node: %w", refused)
	}
	if err := j.overlaid(tx); err != nil {
		return err
	}
	a, most := &j.args, types.Or(j.perf().MaxChunk, 0)
	if c := j.driver.Cluster(); most > 0 && most < c {
		return fmt.Errorf("Required max-chunk (%d) is less than backup cluster size (%d)", most, c)
	}
	spec := blockjob.Spec(types.JobTypeBackup, j, a.JobID, a.Speed, a.AutoFinalize, a.AutoDismiss)
	spec.Txn, spec.Nodes = txn, []*graph.Node{j.site.Filter}
	spec.Instant = visible.StartFirst(visible.Backup, visible.Disks{
		AtOnce: graph.Now.Instant(j.source) && graph.Now.Instant(j.target), Size: j.source.Size(),
	})
	spec.Args = a
	if err := j.site.Create(m, spec); err != nil {
		return err
	}
	j.driver.OnCopied(j.site.Job.Count)
	if err := j.attach(tx); err != nil {
		return err
	}
	j.entered = true
	j.site.Block(j.site.Filter, j.target) // from here on: later steps of the transaction find them in use
	return nil
}

// takesCompressed tells whether compressed writes come to a node that compresses: filters only pass
// them on.
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

// overlaid refuses a target that an earlier step of the transaction has made the backing file of an
// overlay, which is to find there what it held.
func (j *job) overlaid(tx *graph.Tx) error {
	before := j.target.Parents()
	for _, e := range tx.Parents(j.target) {
		if n := e.ParentNode(); n != nil && e.Role()&perm.COW != 0 && !slices.Contains(before, e) {
			return graph.Busy(j.target.Name(), fmt.Errorf("node is used as backing hd of '%s'", n.Name()))
		}
	}
	return nil
}

// makeFilter makes the filter above source and target, without parents yet.
func (j *job) makeFilter(tx *graph.Tx) error {
	name, err := graph.GivenName(j.args.FilterNodeName)
	if err != nil {
		return err
	}
	o := graph.Options{DriverName: copybeforewrite.DriverName, Discard: true}
	filter, err := j.site.MakeFilter(tx, name, o)
	if err != nil {
		return err
	}
	compress := types.Or(j.args.Compress, false)
	p := j.perf()
	cluster, err := copybeforewrite.ClusterSize(j.target, types.Or(p.MinClusterSize, 0))
	if err != nil {
		return err
	}
	j.driver = copybeforewrite.New(filter, j.source.Size(), cluster, compress)
	if !types.Or(p.UseCopyRange, true) {
		j.driver.CopyThroughMemory()
	}
	if types.Or(j.args.DiscardSource, false) {
		j.driver.ChangesSource()
		j.stored = bitmap.New(j.source.Size(), cluster)
	}
	filter.SetDriver(j.driver)
	// In this order, which x-debug-query-block-graph shows.
	if _, err := tx.Attach(filter, "file", perm.Filtered|perm.Primary, j.source); err != nil {
		return err
	}
	if _, err := tx.Attach(filter, "target", perm.Data, j.target); err != nil {
		return err
	}
	return tx.Try()
}

// insert gives the filter the parents of the source.
func (j *job) insert(tx *graph.Tx) error {
	if err := tx.ReplaceNode(j.source, j.site.Filter); err != nil {
		return err
	}
	j.driver.TrackReaders(j.source, j.target)
	if err := tx.Publish(j.site.Filter); err != nil {
		return err
	}
	return tx.Try()
}

// attach takes what the job relies on, and fixes the point in time: the nodes are quiet.
func (j *job) attach(tx *graph.Tx) (err error) {
	all := perm.Claim{Share: perm.All}
	err = j.site.Keep(tx,
		blockjob.Use{Name: "main node", Node: j.site.Filter, Claim: all, Root: &j.root, Ctx: j.patience.Ctx},
		blockjob.Use{Name: "target", Node: j.target, Claim: all})
	if err == nil {
		err = tx.Try() // the job may be the filter's first parent
	}
	if err != nil {
		return err
	}
	pending := j.driver.Pending()
	if j.bitmap != nil {
		j.bitmap.Freeze()
		j.frozen = true
	}
	if j.listed, err = j.source.Bitmaps().New(graph.DirtyBitmapSpec{Bits: pending, Disabled: true}); err != nil {
		return err
	}
	if j.args.Sync == types.MirrorSyncModeBitmap {
		pending.Merge(j.bitmap.Bits())
	} else {
		pending.SetAll()
	}
	j.driver.Access().SetAll()
	j.idle = pending.Empty()
	return nil
}

// abort undoes what enter has done, but for what it did in its transaction.
func (j *job) abort(m *jobs.Manager) {
	j.site.Filter = nil
	j.site.Release()
	if j.listed != nil {
		j.listed.Remove()
	}
	if j.frozen {
		j.bitmap.Reclaim()
		j.frozen = false
	}
	if j.driver != nil {
		_ = j.driver.Close()
	}
	switch {
	case j.site.Job == nil:
	case j.entered:
		m.Abandon(j.site.Job)
	default:
		m.Discard(j.site.Job)
	}
}
