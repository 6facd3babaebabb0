package jobs

import (
	"cmp"
	"context"
	"slices"

	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/jobs/machine"
)

// Action is one step of a QMP transaction, or a command that could be one. Its methods are called in this order,
// each with no lock held:
//
//	Open (optional) --> Prepare --> Commit --> Start (optional) | Abort --> Clean
//
// The nodes of all actions are held (graph.Hold) from before the first Open until after the last Commit, or Clean. Should one that an action names come into being in
// between, everything is undone and begun anew, with the same actions.
//
// All actions prepare in the order they were given, while the nodes of all are quiet; each sees what those before it have done,
// through tx and in what they have changed at once. Then everything is committed, or undone in reverse. Commit and Abort cannot fail;
// Abort is called only after Prepare was, also when that failed, and then undoes what Prepare had done by then.
type Action interface {
	// Nodes are to be quiet from before the first Prepare until after the last Clean. Called before Open and after it.
	Nodes() []*graph.Node
	// Prepare checks the action and makes its changes: those of the graph in tx, others in a way that Abort can undo.
	Prepare(ctx context.Context, tx *graph.Tx) error
	// Commit makes the changes final; the graph is as tx left it.
	Commit()
	Abort()
	// Clean gives back what the action holds; called last in every case.
	Clean()
}

// Opener is an Action with slow work (making an image, opening one) that must not hold up requests: it is done before anything
// is quiet. What Open did is undone by Clean, unless Prepare and Commit made use of it. The sketch, which is never committed, is the graph as the
// actions before will leave it, as far as the Open of later ones relies on that; Open adds to it what Prepare is going to do.
type Opener interface {
	Open(ctx context.Context, sketch *graph.Tx) error
}

// Discreet is an Action that holds more nodes quiet than the reference does: only jobs that reach those of Seen, which are among its Nodes, are seen to
// pause. Asked last, when the action is done or has failed.
type Discreet interface{ Seen() []*graph.Node }

// Holder is an Action that looks at, or changes, nodes that need not be quiet: they are held as well.
type Holder interface{ Holds() []*graph.Node }

// Starter is an Action that starts a job: after all Commits, with the nodes quiet but not held any more, as a job that ends at once holds them itself.
type Starter interface{ Start() }

// NoAction is an Action that does nothing, to embed in those that need few of the methods.
type NoAction struct{}

// Nodes implements Action.
func (NoAction) Nodes() []*graph.Node { return nil }

// Prepare implements Action.
func (NoAction) Prepare(context.Context, *graph.Tx) error { return nil }

// Commit implements Action.
func (NoAction) Commit() {}

// Abort implements Action.
func (NoAction) Abort() {}

// Clean implements Action.
func (NoAction) Clean() {}

// RunActions does all actions or none, at one point in time of all nodes that they name. The error is that of the first action,
// in their order, that fails. It blocks as long as opening, requests under way and the storage do; waiting ends with ctx.
func RunActions(ctx context.Context, g *graph.Graph, actions ...Action) error {
	_, err := runActions(ctx, g, actions)
	return err
}

// runActions is RunActions that tells how many actions had their turn.
func runActions(ctx context.Context, g *graph.Graph, actions []Action) (turns int, err error) {
	for {
		turns, missed, err := runHeld(ctx, g, actions)
		if err == nil || !missed || ctx.Err() != nil {
			return turns, err
		}
	}
}

// nodesOf are all nodes that the actions name.
func nodesOf(actions []Action) (l []*graph.Node) {
	for _, a := range actions {
		l = append(l, a.Nodes()...)
		if h, ok := a.(Holder); ok {
			l = append(l, h.Holds()...)
		}
	}
	return l
}

// runHeld runs the actions with their nodes held. missed tells that an error may come from a node that was not there yet when they were.
func runHeld(ctx context.Context, g *graph.Graph, actions []Action) (turns int, missed bool, err error) {
	hold, err := g.Hold(ctx, func() ([]*graph.Node, error) { return nodesOf(actions), nil })
	if err != nil {
		return 0, false, err
	}
	defer hold.Release()
	undrain := func() {}
	sketch, tx := g.Begin(ctx), g.Begin(ctx)
	sketch.Under(hold)
	tx.Under(hold)
	defer func() {
		missed = sketch.Missed() || tx.Missed()
		tx.Abort()
		sketch.Abort()
		for _, a := range actions {
			certain(a, a.Clean)
		}
		undrain()
		missed = missed && slices.ContainsFunc(nodesOf(actions), func(n *graph.Node) bool { return !hold.Has(n) })
	}()
	// A failing Open is reported in its action's turn: one before it may have a reason of its own to fail.
	failing, openErr := len(actions), error(nil)
	for i, a := range actions {
		if o, ok := a.(Opener); ok {
			if openErr = careful(func() error { return o.Open(ctx, sketch) }); openErr != nil {
				failing = i
				break
			}
		}
	}
	var nodes []*graph.Node
	for _, a := range actions[:failing] {
		for _, n := range a.Nodes() {
			if hold.Has(n) { // else Prepare misses it
				nodes = append(nodes, n)
			}
		}
	}
	if len(nodes) > 0 {
		end, err := g.Drain(ctx, nodes...)
		if err != nil {
			return 0, false, err
		}
		undrain = end
	}
	for i, a := range actions {
		err := openErr
		if i < failing {
			if err = careful(func() error { return a.Prepare(ctx, tx) }); err == nil {
				continue
			}
			abort(actions[:i+1])
		} else {
			abort(actions[:i])
		}
		return i + 1, false, err
	}
	if err := tx.Commit(); err != nil {
		abort(actions)
		return len(actions), false, err
	}
	for _, a := range actions {
		certain(a, a.Commit)
	}
	hold.Release()
	for _, a := range actions {
		if s, ok := a.(Starter); ok {
			certain(a, s.Start)
		}
	}
	return len(actions), false, nil
}

// Transaction is RunActions for commands that clients see to quiesce the graph: every job that is at work then is paused in passing, and once more
// if it reaches one of the nodes, also if the command fails; as in the reference. (The pauses are only told: a job's next unit of work
// waits at its closed gate in any case.)
func (m *Manager) Transaction(ctx context.Context, g *graph.Graph, actions ...Action) error {
	m.mu.Lock()
	before := slices.Clone(m.jobs)
	m.mu.Unlock()
	m.blink(before)
	near := map[*graph.Node][]*Job{} // as it is now
	for _, a := range actions {
		for _, n := range a.Nodes() {
			near[n] = m.near(g, n)
		}
	}
	turns, err := runActions(ctx, g, actions)
	var seen []*Job
	for _, a := range actions[:turns] {
		nodes := a.Nodes
		if d, ok := a.(Discreet); ok {
			nodes = d.Seen
		}
		for _, n := range nodes() {
			seen = appendNew(seen, near[n])
		}
	}
	m.blink(seen)
	return err
}

// appendNew appends those of more that are not in l.
func appendNew(l, more []*Job) []*Job {
	for _, j := range more {
		if !slices.Contains(l, j) {
			l = append(l, j)
		}
	}
	return l
}

// Quiescing runs f, which clients see to quiesce the nodes, as they are before it and after it: every job that reaches one of them and is at work
// is paused in passing, also if f fails.
func (m *Manager) Quiescing(g *graph.Graph, nodes func() []*graph.Node, f func() error) error {
	near := m.near(g, nodes()...)
	err := f()
	m.blink(appendNew(near, m.near(g, nodes()...)))
	return err
}

// Quiesced tells clients that the nodes were quiet for a moment, as often as the reference has them so: every job that reaches one of them and is at work
// is paused in passing each time. What happens here in such a moment needs no job to pause.
func (m *Manager) Quiesced(times int, nodes ...*graph.Node) {
	if len(nodes) == 0 {
		return
	}
	near := m.near(nodes[0].Graph(), nodes...)
	for range times {
		m.blink(near)
	}
}

// near are the jobs that reach one of the nodes.
func (m *Manager) near(g *graph.Graph, nodes ...*graph.Node) []*Job {
	near := map[string]bool{}
	for _, r := range g.RootsAbove(nodes...) {
		if r.Spec().Kind == graph.KindJob {
			near[r.Spec().Name] = true
		}
	}
	m.mu.Lock()
	jobs := slices.Clone(m.jobs)
	m.mu.Unlock()
	return slices.DeleteFunc(jobs, func(j *Job) bool { return !near[j.id] })
}

// blink lets the jobs that are at work show themselves paused and going on.
func (m *Manager) blink(l []*Job) {
	if len(l) == 0 {
		return
	}
	spans := spansOf(l)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, j := range m.pauseLocked(l, spans) {
		j.stepLocked(machine.LeavePause)
	}
}

// pauseLocked lets the jobs that are at work show themselves paused, and returns them: all are paused before the first goes on, in the order in which the
// reference quiesces nodes. A job is paused with the oldest of its nodes, and goes on with the newest.
// +checklocks:m.mu
func (m *Manager) pauseLocked(l []*Job, spans map[*Job]span) (goOn []*Job) {
	for _, j := range l {
		if s := j.st.Status; (s == machine.Running || s == machine.Ready) && j.st.Started && !j.st.Ended && !j.st.ShouldPause() && !j.st.Forced {
			goOn = append(goOn, j)
		}
	}
	slices.SortStableFunc(goOn, func(a, b *Job) int { return cmp.Compare(spans[a].first, spans[b].first) })
	for _, j := range goOn {
		j.stepLocked(machine.EnterPause)
	}
	slices.SortStableFunc(goOn, func(a, b *Job) int { return cmp.Compare(spans[a].last, spans[b].last) })
	return goOn
}

// span is when the first and the last of a job's nodes were made.
type span struct{ first, last uint64 }

func spansOf(l []*Job) map[*Job]span {
	spans := map[*Job]span{}
	if len(l) > 1 {
		for _, j := range l {
			first, last := graph.CreationSpan(j.nodes...)
			spans[j] = span{first, last}
		}
	}
	return spans
}

func abort(actions []Action) {
	for _, a := range slices.Backward(actions) {
		certain(a, a.Abort)
	}
}

// careful calls an action: a panic is an error of it, and the others are undone.
func careful(f func() error) (err error) {
	defer panics.Into("a step of a transaction", &err)
	return f()
}

// certain calls what of an action cannot fail. After a panic its nodes are in doubt; the other actions have their turn.
func certain(a Action, f func()) {
	if err := careful(func() error { f(); return nil }); err != nil {
		for _, n := range nodesOf([]Action{a}) {
			n.Fail(err)
		}
	}
}
