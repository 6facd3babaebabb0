package blockjob

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
)

// Site is the place of a block job in the graph. Its methods are called by the job's start and its
// runner, one at a time; the nodes are held.
type Site struct {
	m      *jobs.Manager
	Job    *jobs.Job   // nil: not created yet
	Filter *graph.Node // nil: there is none, or none any more

	roots    []*graph.Root
	thaw     []func(tx *graph.Tx) error // lets tx change what is frozen
	unfreeze []func()
	unblock  []func()
	restore  func()
}

// Create creates the job.
func (s *Site) Create(m *jobs.Manager, spec jobs.Spec) (err error) {
	s.m = m
	s.Job, err = m.Create(spec)
	return err
}

// Patience is for jobs whose requests may wait for a target that does not answer: nobody waits any
// more once such a job is cancelled by force.
type Patience struct {
	Ctx context.Context // of the job's requests
	end context.CancelFunc
}

// NewPatience is one that has not ended.
func NewPatience() (p Patience) {
	p.Ctx, p.end = context.WithCancel(context.Background())
	return p
}

// EndsWith has the patience end with ctx, that of the job at work, until stop is called.
func (p *Patience) EndsWith(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, p.end)
}

// MakeWritable makes n writable for the time of the job, if it is read-only, with the children that
// have that from it.
func (s *Site) MakeWritable(ctx context.Context, n *graph.Node) (err error) {
	if s.restore, err = MakeWritable(ctx, n); err != nil {
		s.giveUp()
	}
	return err
}

// MakeWritable makes n writable until restore is called, if it is read-only, with the children that
// have that from it; also if it is one that a job before could not make read-only again.
func MakeWritable(ctx context.Context, n *graph.Node) (restore func(), err error) {
	nodes := graph.Now.WithFiles(n)
	switch {
	case n.ReadOnly():
		err = graph.LendWritable(ctx, nodes...)
	case graph.WritersBarred(n):
		err = n.Graph().Do(ctx, func(tx *graph.Tx) error { return tx.BarWriters(n, nil) })
	default:
		return func() {}, nil
	}
	if err != nil {
		return func() {}, err
	}
	return func() { makeReadOnly(nodes) }, nil
}

// makeReadOnly ends MakeWritable. A node that cannot follow takes no writers until the next job or
// blockdev-reopen.
func makeReadOnly(nodes []*graph.Node) { graph.EndWriting("again after a job", nodes...) }

// EndReadOnly makes the nodes read-only when the job ends, if there are any, in place of what
// MakeWritable was to undo.
func (s *Site) EndReadOnly(nodes []*graph.Node) {
	if s.restore = nil; len(nodes) > 0 {
		s.restore = func() { makeReadOnly(nodes) }
	}
}

// Enter puts the job into the graph by one transaction, which fill has filled. On error nothing has
// changed, and the job was taken back.
func (s *Site) Enter(ctx context.Context, g *graph.Graph, fill func(tx *graph.Tx) error) (*jobs.Job, error) {
	tx := g.Begin(ctx)
	defer tx.Abort()
	err := fill(tx)
	if err == nil {
		err = tx.Publish(s.Filter)
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		s.giveUp()
		return nil, err
	}
	return s.Job, nil
}

func (s *Site) giveUp() {
	if s.Job != nil {
		s.m.Discard(s.Job)
	}
	if s.restore != nil {
		s.restore()
	}
}

// MakeFilter makes the job's filter. It shows the default cache mode, as in QEMU, whatever that of
// the node it is for. The name "" is generated, and the filter then implicit.
func (s *Site) MakeFilter(tx *graph.Tx, name string, o graph.Options) (*graph.Node, error) {
	o.Name, o.Implicit, o.Kind = name, name == "", graph.Filter
	n, err := tx.NewNode(&o)
	s.Filter = n
	return n, err
}

// Use is a node that the job relies on: it lives as long as the job, and others do with it what the
// claim shares.
type Use struct {
	Name  string // of the edge; "": the job's own requests
	Node  *graph.Node
	Claim perm.Claim
	Root  **graph.Root // where the root goes to, for requests; or nil
	// Ctx is the context of those requests; nil: they wait for their answers however long that is.
	Ctx context.Context
}

// Keep attaches a root of the job to each of the nodes. What is recorded of the job comes and goes
// with the first.
func (s *Site) Keep(tx *graph.Tx, uses ...Use) error {
	for _, u := range uses {
		spec := graph.RootSpec{
			EdgeName: u.Name, Kind: graph.KindJob, Name: s.Job.ID(), Desc: s.Job.Describe(), Claim: u.Claim,
			StayAtNode: true, Job: true,
		}
		if u.Name == "" {
			spec = graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: u.Claim, StayAtNode: true, Job: true}
		}
		spec.Ctx = u.Ctx
		if len(s.roots) == 0 {
			spec.Of = s.Job.Record()
		}
		r, err := tx.AttachRoot(spec, u.Node)
		if err != nil {
			return err
		}
		if s.roots = append(s.roots, r); u.Root != nil {
			*u.Root = r
		}
	}
	return nil
}

// FreezeChain is graph.Tx.FreezeChain until Leave or Release.
func (s *Site) FreezeChain(tx *graph.Tx, top, base *graph.Node) error {
	unfreeze, err := tx.FreezeChain(top, base)
	return s.frozen(unfreeze, err, func(tx *graph.Tx) error { return tx.Thaw(top, base) })
}

// FreezeOverlays is graph.Tx.FreezeOverlays until Leave or Release.
func (s *Site) FreezeOverlays(tx *graph.Tx, n *graph.Node) error {
	unfreeze, err := tx.FreezeOverlays(n)
	return s.frozen(unfreeze, err, func(tx *graph.Tx) error { return tx.ThawOverlays(n) })
}

func (s *Site) frozen(unfreeze func(), err error, thaw func(tx *graph.Tx) error) error {
	if err == nil {
		s.unfreeze, s.thaw = append(s.unfreeze, unfreeze), append(s.thaw, thaw)
	}
	return err
}

// Block keeps others away from the nodes until Release.
func (s *Site) Block(nodes ...*graph.Node) {
	reason := fmt.Errorf("block device is in use by block job: %s", s.Job.Type())
	for _, n := range nodes {
		s.unblock = append(s.unblock, n.Block(graph.AllOps&^graph.OpDataplane, reason))
	}
}

// BlockAt is Block from the commit of tx on.
func (s *Site) BlockAt(tx *graph.Tx, nodes ...*graph.Node) {
	tx.Join(graph.OnCommit(func() { s.Block(nodes...) }))
}

// Leave lets tx give back what the job relies on, but for the filter.
func (s *Site) Leave(tx *graph.Tx) error {
	for _, f := range s.thaw {
		if err := f(tx); err != nil {
			return err
		}
	}
	for _, r := range s.roots {
		if err := tx.DetachRoot(r); err != nil {
			return err
		}
	}
	return nil
}

// TakeOut takes the filter out of the graph, if it is still there, and gives back what the job
// relies on: more does whatever else belongs to that. It tells whether there was something to do.
// It cannot fail:
//
// While the job ran its filter may have shared more than its parents do, or have kept them apart
// from what others do beside it. Nodes that were added meanwhile can rely on that, and then nothing
// but the filter stands between the two. It stays in this case, with nothing of the job in it, as
// one that passes everything on, until its last parent goes. Giving back claims only loosens them,
// so that much is always possible; if not, the filter is unusable.
func (s *Site) TakeOut(more func(tx *graph.Tx) error) bool {
	n := s.Filter
	if n == nil {
		return false
	}
	s.Filter = nil
	leave := func(remove bool) error {
		tx := n.Graph().Begin(context.Background())
		defer tx.Abort()
		tx.Ending()
		err := s.Leave(tx)
		if err == nil && more != nil {
			err = more(tx)
		}
		if err == nil && remove {
			err = tx.RemoveFilter(n)
		}
		if err == nil {
			err = tx.Commit()
		}
		if errors.Is(err, blk.ErrClosed) {
			return nil // at the end of the daemon: there is nothing to give back any more
		}
		return err
	}
	if err := leave(true); err != nil {
		slog.Warn("the filter of a job stays until its last user goes", "job", s.Job.ID(), "node", n.Name(), "error", err)
		if err = leave(false); err != nil {
			n.Fail(fmt.Errorf("Job '%s' cannot be taken out of the graph: %w", s.Job.ID(), err))
		}
	}
	return true
}

// Release ends all that the job still has of the graph.
func (s *Site) Release() {
	s.TakeOut(nil)
	for _, f := range s.unfreeze { // where the graph was closed already
		f()
	}
	if s.restore != nil {
		s.restore() // the next job on these nodes must find them as this one did
	}
	for _, f := range s.unblock {
		f()
	}
	s.unfreeze, s.unblock, s.restore = nil, nil, nil
}
