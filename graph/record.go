package graph

import (
	"log/slog"
	"slices"
	"sync"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// State that is to outlive the process is told to a Recorder as values, each under a key of its
// own:
//
//	node n1         NodeState
//	node n1.file    EdgeState: its child "file"
//	bitmap n1.b1    *types.BlockDirtyBitmapAdd
//	export e1       *types.BlockExportOptions
//	export e1.root  EdgeState: the node that it shows now
//	job j1          jobs.State: the arguments of the command that started it, and what changed since
//
// Hidden and closing nodes are no part of it, nor are roots that belong to nothing or stay at their
// nodes, nor what follows from the rest: claims, freezes, who uses a bitmap.

// StateKind is what a Key names.
type StateKind string

const (
	StateNode   StateKind = "node"
	StateBitmap StateKind = "bitmap" // Key.Name is that of its node
	StateExport StateKind = "export"
	StateJob    StateKind = "job"
)

// Key names one piece of state. Part is empty, or the name of a child edge or of a bitmap.
type Key struct {
	Kind       StateKind
	Name, Part string
}

func (k Key) String() string {
	s := string(k.Kind) + " " + k.Name
	if k.Part != "" {
		s += "." + k.Part
	}
	return s
}

// Change says what is under Key from now on: an immutable value, or nil for nothing.
type Change struct {
	Key   Key
	Value any
}

// NodeState is what makes a published node again.
type NodeState struct {
	Options *Options
	// ReadOnly is Node.ReadOnly, which Options may not ask for, or what that is to be again if the
	// node is lent (SetLent); so are Options then. Owned is Node.MonitorOwned.
	ReadOnly, Inactive, Owned bool
}

// EdgeState is an edge from a published node, or from what a root belongs to.
type EdgeState struct {
	Child string // the name of the node below
	Role  perm.Role
}

// Record is state that is neither a node nor an edge: what an export or a job is made of. It is
// there as long as the root is that has it (RootSpec.Of), or between Graph.Enter and Graph.Leave.
type Record struct {
	key   Key
	mu    sync.Mutex // held while the recorder is told; g.mu may be taken under it
	value any
	in    *Graph // nil: it is not there
}

// NewRecord makes a record, which is nowhere yet. The value is immutable.
func NewRecord(k Key, value any) *Record { return &Record{key: k, value: value} }

// Key is what the value is recorded under.
func (r *Record) Key() Key { return r.key }

// Value is what is recorded, or will be when it comes to be there.
func (r *Record) Value() any {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.value
}

// Set changes the value. It may block, and fails if the recorder refuses; then nothing has changed.
func (r *Record) Set(value any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.in != nil && value != r.value {
		if err := r.in.tell([]Change{{r.key, value}}); err != nil {
			return err
		}
	}
	r.value = value
	return nil
}

// Enter lets r, which no root has, be there from now on. It may block, and fails if the recorder
// refuses.
func (g *Graph) Enter(r *Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := g.tell([]Change{{r.key, r.value}})
	if err == nil {
		r.in = g
	}
	return err
}

// Leave ends that. It may block.
func (g *Graph) Leave(r *Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.in = nil
	if err := g.tell([]Change{{Key: r.key}}); err != nil {
		slog.Error("the end of something could not be recorded", "what", r.key, "error", err)
	}
}

// Recorder is told of changes before they show. Once it has returned nil they happen, all of them;
// after an error they are undone, but for those of a Tx that is Ending. It may block. It is called
// with no lock held, for different keys also at the same time, and must not change the graph.
type Recorder func([]Change) error

// SetRecorder makes r hear of all changes from the next transaction on; nil: nobody does.
func (g *Graph) SetRecorder(r Recorder) {
	if r == nil {
		g.recorder.Store(nil)
		return
	}
	g.recorder.Store(&r)
}

// Ending says that the Tx gives back what somebody had of the graph: the recorder is told of it,
// but cannot refuse it.
func (tx *Tx) Ending() { tx.ending = true }

func (g *Graph) tell(l []Change) error {
	if r := g.recorder.Load(); r != nil && len(l) > 0 {
		return (*r)(l)
	}
	return nil
}

// record reports what the commit changes. Nothing that follows can fail.
func (c *commit) record() error {
	records := c.records()
	for r := range records {
		r.mu.Lock()
		defer r.mu.Unlock()
	}
	d := &delta{draft: c.draft, told: map[*Node]bitmapStates{}}
	if c.g.recorder.Load() != nil {
		d.collect(c)
	}
	if err := c.g.tell(append(d.gone, d.is...)); err != nil {
		if !c.tx.ending {
			return err
		}
		slog.Error("a change of the graph could not be recorded", "error", err)
	}
	for r, in := range records {
		r.in = in
	}
	for n, l := range d.told {
		n.bitmaps.tell(l)
	}
	return nil
}

// records are those that come or go with their roots, and where they are then. No other commit has
// one of them: it would have its node, too.
func (c *commit) records() map[*Record]*Graph {
	c.g.mu.RLock()
	defer c.g.mu.RUnlock()
	l := map[*Record]*Graph{}
	for _, e := range c.draft.edges {
		gone := c.draft.Gone(e)
		switch {
		case e.root == nil || e.root.spec.Of == nil || e.attached != gone:
		case gone:
			l[e.root.spec.Of] = nil
		default:
			l[e.root.spec.Of] = c.g
		}
	}
	return l
}

// delta is what a commit changes of the state.
type delta struct {
	draft    *txDraft
	gone, is []Change // gone is told first: something else may come under the same key
	told     map[*Node]bitmapStates
}

// collect finds all changes. It costs what the plan has touched.
func (d *delta) collect(c *commit) {
	c.g.mu.RLock()
	defer c.g.mu.RUnlock()
	edges := slices.Clone(d.draft.edges)
	for _, n := range unique(c.delta.Order, d.draft.refd) {
		is := d.draft.stateLocked(n)
		was := stateLocked(n)
		d.add(Key{Kind: StateNode, Name: n.name}, was, is)
		if (was == nil) != (is == nil) {
			edges = append(edges, d.draft.Children(n)...)
			d.addBitmaps(n, is != nil)
		}
	}
	if h := c.tx.hold; h != nil {
		for _, n := range h.res.nodes {
			if _, done := d.told[n]; !done && n.state == nodePublished {
				d.addBitmaps(n, true)
			}
		}
	}
	for _, e := range unique(edges) {
		d.addEdgeLocked(e)
	}
}

// add adds what was and what will be under k; nil is nothing.
func (d *delta) add(k Key, was, is any) {
	switch {
	case is == was:
	case is == nil:
		d.gone = append(d.gone, Change{Key: k})
	default:
		d.is = append(d.is, Change{k, is})
	}
}

// addEdgeLocked adds what becomes of e, and of what its root belongs to.
func (d *delta) addEdgeLocked(e *Edge) {
	was, is := e.attached, !d.draft.Gone(e)
	k := Key{Kind: StateNode, Part: e.name}
	if e.root != nil {
		of := e.root.spec.Of
		if of == nil {
			return
		}
		k.Kind, k.Name = of.key.Kind, of.key.Name
		if was != is { // and so it is locked
			d.add(of.key, valueIf(was, of.value), valueIf(is, of.value))
		}
		if e.root.spec.StayAtNode {
			return
		}
	} else {
		k.Name = e.pnode.name
		was = was && e.pnode.state == nodePublished
		is = is && d.draft.stateLocked(e.pnode) != nil
	}
	d.add(k, valueIf(was, EdgeState{e.Node().name, e.role}), valueIf(is, EdgeState{d.draft.Target(e).name, e.role}))
}

func valueIf(there bool, v any) any {
	if there {
		return v
	}
	return nil
}

// stateLocked is the NodeState of n, or nil if it has none to record. The caller holds g.mu.
func stateLocked(n *Node) any {
	if n.state != nodePublished {
		return nil
	}
	if o := n.lent; o != nil {
		return NodeState{o, true, n.inactive.Load(), n.owned}
	}
	return NodeState{n.opts.Load(), n.readOnly.Load(), n.inactive.Load(), n.owned}
}

// StateOf is what is recorded of n, which is published.
func StateOf(n *Node) NodeState {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	s, _ := stateLocked(n).(NodeState)
	return s
}

// stateLocked is that of n as the Tx would leave it.
func (d *txDraft) stateLocked(n *Node) any {
	r := d.refs[n]
	if r == nil {
		r = &refs{owned: n.owned}
	}
	shown := n.state == nodePublished || n.state == nodeHidden && r.publish
	if !shown || !r.owned && n.pins+r.pins <= 0 && d.Orphan(n) {
		return nil
	}
	st := d.Node(n)
	if o := d.lentOf(n); o != nil {
		return NodeState{o, true, st.Inactive, r.owned}
	}
	return NodeState{d.options(n), st.ReadOnly, st.Inactive, r.owned}
}

// bitmapState is what is told of a bitmap, and bitmapStates of all that have names.
type (
	bitmapState struct {
		granularity          uint32
		persistent, disabled bool
	}
	bitmapStates map[string]bitmapState
)

// addBitmaps adds what has become of the bitmaps of n since the last time, or that all are gone
// with it.
func (d *delta) addBitmaps(n *Node, there bool) {
	var is bitmapStates
	was, now := n.bitmaps.states()
	if there {
		is = now
	}
	if len(was) == 0 && len(is) == 0 {
		return
	}
	d.told[n] = is
	for name := range was {
		if _, ok := is[name]; !ok {
			d.gone = append(d.gone, Change{Key: Key{StateBitmap, n.name, name}})
		}
	}
	for name, b := range is {
		if old, ok := was[name]; !ok || old != b {
			d.is = append(d.is, Change{Key{StateBitmap, n.name, name}, &types.BlockDirtyBitmapAdd{
				Node: n.name, Name: name, Granularity: &b.granularity, Persistent: &b.persistent, Disabled: &b.disabled}})
		}
	}
}

// states are what was told last of the bitmaps, and what they are about to be: what is foretold of
// them counts as done.
func (s *Bitmaps) states() (told, is bitmapStates) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		if d.name == "" || d.pending == PendingRemove {
			continue
		}
		if is == nil {
			is = bitmapStates{}
		}
		is[d.name] = bitmapState{uint32(d.bits.Granularity()), d.persistent, d.disabled || d.pending == PendingDisable}
	}
	return s.told, is
}

func (s *Bitmaps) tell(l bitmapStates) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = l
}
