// Package stream is the job behind block-stream: it copies what the backing chain of a node holds
// into the node, down to a base that stays, and then makes the node's backing link skip what it has copied.
//
//	 before                 while it runs                     after
//
//	parents                parents                           parents
//	   |                      |                                 |
//	  top                  filter (copy-on-read)               top
//	   | backing              | file                            | backing
//	  mid                    top <--- writes what is read      base
//	   | backing              | backing       (frozen)
//	  base                   mid
//	                          | backing
//	                         base
//
// Guests keep writing: each extent is copied under a conflict lock on the top node, and only where the top node has
// nothing of its own by then.
package stream

import (
	"context"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/chain"
	"qblockd/jobs/copy"
	"qblockd/schema/types"
)

const (
	// chunk is the largest extent copied at once, in bytes; one such extent is the grain of the speed limit.
	chunk = 512 << 10
	// workers copy extents at the same time.
	workers = 4
)

// Args says what to stream. Top, and Base or Bottom, were looked up by the caller.
type Args struct {
	ID     string
	Top    *graph.Node
	Base   *graph.Node // stays; nil: nothing stays
	Bottom *graph.Node // the last one to be copied, instead of Base
	// BackingFile is what the image header will name; "" means the base's own name.
	BackingFile string
	// MaskProtocol writes "raw" for the format of a base that is a protocol node.
	MaskProtocol   bool
	Speed          int64 // bytes per second, 0: no limit
	OnError        types.BlockdevOnError
	FilterNodeName string // "": generated, and the filter is implicit
	ManualFinalize bool
	ManualDismiss  bool
	// Hold is the caller's of the nodes; it ends before the job goes to work. Nil: there is none.
	Hold *graph.Hold
	// HeaderName is how an overlay's header names a node, and the format.
	HeaderName func(*graph.Node) (name, format string, err error)
}

// errInUse is why the nodes of a job take no other operation.
var errInUse = errors.New("block device is in use by block job: stream")

type job struct {
	Args
	g           *graph.Graph
	baseOverlay *graph.Node // the last one to be copied
	aboveBase   *graph.Node // directly above what stays: baseOverlay or a filter above the base
	filter      *graph.Node // nil once removed
	driver      *filterDriver
	wasReadOnly []*graph.Node
	claimed     func()        // ends the block of the top by makeWritable; nil: there was none
	root        *graph.Root   // the job's requests
	holds       []*graph.Root // what the job relies on
	unblock     []func()
	unfreeze    func()
}

// Start checks the arguments, inserts the filter and starts the job; see jobs.Manager.Start for release. On error nothing
// has changed.
func Start(ctx context.Context, m *jobs.Manager, a Args) (release func(), err error) {
	j := &job{Args: a, g: a.Top.Graph()}
	if err := j.findBase(); err != nil {
		return nil, err
	}
	if err := j.blocked(); err != nil {
		return nil, err // told before anything that cannot be frozen
	}
	unfreeze, err := j.makeWritable(ctx)
	if err != nil {
		return nil, err
	}
	defer unfreeze()
	mj, err := j.attach(ctx, m)
	if err != nil {
		j.restoreReadOnly()
		return nil, err
	}
	a.Hold.Release()
	return m.Start(mj), nil
}

func (j *job) findBase() error {
	if j.Bottom != nil {
		j.baseOverlay, j.aboveBase = j.Bottom, j.Bottom
		return nil
	}
	overlay := j.Top.SkipFilters()
	for {
		e := overlay.Backing()
		if e == nil {
			if j.Base != nil {
				return fmt.Errorf("'%s' is not in the backing chain of '%s'", j.Base.Name(), j.Top.Name())
			}
			break
		}
		if j.Base != nil && e.Node().SkipFilters() == j.Base.SkipFilters() {
			break
		}
		overlay = e.Node().SkipFilters()
	}
	j.baseOverlay, j.aboveBase = overlay, overlay
	if e := overlay.Backing(); e != nil && j.Base != nil {
		for n := e.Node(); n != j.Base; n = n.FilteredChild().Node() {
			j.aboveBase = n
		}
	}
	return nil
}

// attach builds the filter and the job's holds in one transaction.
func (j *job) attach(ctx context.Context, m *jobs.Manager) (*jobs.Job, error) {
	tx := j.g.Begin(ctx)
	defer tx.Abort()
	mj, err := j.fill(tx, m)
	if err == nil {
		tx.Check(j.blocked)
		tx.Join(graph.OnCommit(j.keepOthersAway))
		if err = tx.Commit(); err != nil {
			m.Discard(mj)
		}
	}
	if err != nil {
		return nil, err
	}
	return mj, nil
}

// chain is the top and what lies below it, as far as the job relies on it.
func (j *job) chain() (l []*graph.Node) {
	for n := j.Top; ; {
		l = append(l, n)
		e := n.FilterOrCOWChild()
		if n == j.aboveBase || e == nil {
			return l
		}
		n = e.Node()
	}
}

// blocked tells why another job does not let this one in. Asked with the nodes reserved: of two jobs that start at the same
// time on one chain one sees the other.
func (j *job) blocked() error {
	for _, n := range j.chain() {
		if n == j.Top && j.claimed != nil {
			continue // by this job itself
		}
		if err := n.Blocked(graph.OpStream); err != nil {
			return err
		}
	}
	return nil
}

// keepOthersAway keeps others away from the nodes of the job from the moment it is in the graph.
func (j *job) keepOthersAway() {
	for _, n := range append(j.chain(), j.filter) {
		j.unblock = append(j.unblock, n.BlockAll(errInUse, graph.OpDataplane))
	}
}

func (j *job) fill(tx *graph.Tx, m *jobs.Manager) (*jobs.Job, error) {
	if err := j.freeze(tx); err != nil {
		return nil, err
	}
	top := j.Top.Options()
	filter, err := tx.NewNode(&graph.Options{
		Name: j.FilterNodeName, DriverName: DriverName, Kind: graph.Filter,
		Implicit: j.FilterNodeName == "", Discard: true, Direct: top.Direct, NoFlush: top.NoFlush,
	})
	if err != nil {
		return nil, fmt.Errorf("Could not create node: %w", err)
	}
	j.filter = filter
	j.driver = &filterDriver{node: filter}
	filter.SetDriver(j.driver)
	_, err = tx.InsertFilter(filter, "file", j.Top)
	if err == nil {
		err = tx.Try() // what the graph does not allow is told before the job is announced
	}
	if err != nil {
		return nil, fmt.Errorf("Could not create node: %w", err)
	}
	m.Quiesced(1, j.Top)
	mj, err := m.Create(jobs.Spec{
		ID: j.ID, Type: types.JobTypeStream, Runner: j, Block: true, Speed: j.Speed,
		ManualFinalize: j.ManualFinalize, ManualDismiss: j.ManualDismiss, Nodes: []*graph.Node{filter},
	})
	if err != nil {
		m.Quiesced(1, j.Top)
		return nil, err
	}
	if err := j.hold(tx, mj); err != nil {
		m.Discard(mj)
		return nil, err
	}
	tx.Publish(filter)
	return mj, nil
}

// freeze makes the chain stay as it was found.
func (j *job) freeze(tx *graph.Tx) (err error) {
	for n := j.Top; n != j.aboveBase; {
		e := tx.FilterOrCOWChild(n)
		if e == nil {
			return fmt.Errorf("The backing chain of '%s' has changed", j.Top.Name())
		}
		n = tx.Target(e)
	}
	if j.wasReadOnly != nil {
		// It is frozen by makeWritable.
		if err := tx.Thaw(j.Top, j.aboveBase); err != nil {
			return err
		}
	}
	j.unfreeze, err = tx.FreezeChain(j.Top, j.aboveBase)
	return err
}

// hold takes what the job relies on: the right to read and to write unchanged data at the top, no resize
// there, and no writes to what is copied.
func (j *job) hold(tx *graph.Tx, mj *jobs.Job) error {
	const unchanging = perm.ConsistentRead | perm.WriteUnchanged
	spec := graph.RootSpec{Kind: graph.KindJob, Name: mj.ID(), Desc: mj.Describe(), StayAtNode: true, Job: true}
	add := func(name string, c perm.Claim, n *graph.Node) error {
		spec.EdgeName, spec.Claim = name, c
		r, err := tx.AttachRoot(spec, n)
		j.holds = append(j.holds, r)
		return err
	}
	if err := add("main node", perm.Claim{Share: perm.All}, j.filter); err != nil {
		return err
	}
	if err := add("active node", perm.Claim{Share: unchanging | perm.Write}, j.Top); err != nil {
		return err
	}
	for n := j.Top; n != j.aboveBase; {
		n = n.FilterOrCOWChild().Node()
		if err := add("intermediate node", perm.Claim{Share: unchanging}, n); err != nil {
			return err
		}
	}
	root, err := tx.AttachRoot(graph.RootSpec{
		EdgeName: "root", Kind: graph.KindBackend, StayAtNode: true, Job: true,
		Claim: perm.Claim{Need: perm.ConsistentRead, Share: unchanging | perm.Write},
	}, j.filter)
	j.root = root
	return err
}

// Run implements jobs.Runner.
func (j *job) Run(ctx context.Context, h *jobs.Handle) error {
	top := j.Top.SkipFilters()
	if top == j.baseOverlay {
		return nil // nothing between it and what stays
	}
	size := j.Top.Size()
	h.SetRemaining(size)
	c := copier{target: j.filter.FilteredChild(), below: top.Backing(), last: j.baseOverlay}
	return copy.Run(h, copy.Task{
		Gate: copy.RootGate(ctx, j.root), Size: size, Chunk: chunk, Workers: workers,
		Guests: &j.driver.guests, Look: c.look, Copy: c.copy,
		Operation: types.IoOperationTypeRead, Policy: j.OnError,
	})
}

// Prepare implements jobs.Preparer: it removes the filter, makes the backing link of the top skip what was
// copied, and rewrites the image's header, all or nothing.
func (j *job) Prepare(ctx context.Context, h *jobs.Handle) error {
	hold, err := j.g.HoldNodes(ctx, j.chain()...)
	if err != nil {
		return err
	}
	defer hold.Release()
	top := j.Top.SkipFilters()
	tx := j.g.Begin(context.WithoutCancel(ctx))
	defer tx.Abort()
	tx.Quiet(j.root)
	if err := tx.Thaw(j.Top, j.aboveBase); err != nil {
		return err
	}
	if err := j.leave(tx); err != nil {
		return err
	}
	if err := tx.RemoveFilter(j.filter); err != nil {
		return err
	}
	if cow := top.Backing(); cow != nil {
		var base *graph.Node
		if e := j.aboveBase.FilterOrCOWChild(); e != nil {
			base = e.Node()
		}
		header := &chain.HeaderChange{Node: top}
		var err error
		if base == nil {
			err = tx.Detach(cow)
		} else {
			header.Name, header.Format, err = chain.HeaderNames(base, j.HeaderName, j.BackingFile, j.MaskProtocol)
			if err == nil && cow.Node() != base {
				err = tx.Replace(cow, base)
			}
		}
		if err != nil {
			return err
		}
		tx.Drain(top)
		tx.Join(header)
	}
	below := j.Top.NodesBelow()
	if err := tx.Commit(); err != nil {
		return err
	}
	h.Quiesced(2, j.Top)
	h.Quiesced(2, below...)
	j.filter, j.root, j.holds = nil, nil, nil
	return nil
}

// Clean implements jobs.Cleaner.
func (j *job) Clean(h *jobs.Handle) {
	if hold, err := j.g.HoldNodes(context.Background(), j.Top); err == nil {
		defer hold.Release()
	}
	j.unfreeze()
	if j.filter != nil {
		chain.TakeOut(j.ID, j.filter, j.root, j.leave)
		h.Quiesced(3, j.Top)
		j.filter = nil
	}
	// The next job on these nodes must find them as this one did.
	j.restoreReadOnly()
	for _, f := range j.unblock {
		f()
	}
	j.unblock = nil
}

// leave lets tx give back what the job relies on.
func (j *job) leave(tx *graph.Tx) error {
	for _, r := range append(j.holds, j.root) {
		if err := tx.DetachRoot(r); err != nil {
			return err
		}
	}
	return nil
}
