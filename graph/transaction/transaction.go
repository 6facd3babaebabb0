// Package transaction runs steps of the QMP command `transaction`, and commands that could be one:
// all of them or none, at one point in time of all the nodes that they name.
//
//	hold ---> open ---> drain ---> prepare ---> commit ---> start ---> clean
//	            \          \          \-----------\---> abort ---------/
//	             \----------\-----------------------------------------/
//
// What is slow (making an image, opening one) comes first, while guests go on. Then all nodes are
// quiesced once, each action prepares in the order given, and one graph.Tx is committed; or
// everything is undone in reverse.
package transaction

import (
	"context"
	"slices"

	"qblockd/events/panics"
	"qblockd/graph"
)

// Action is one step. Its methods are called with no lock held, in this order:
//
//	Open (optional) --> Prepare --> Commit --> Start (optional) | Abort --> Clean
//
// An action sees what those before it have done: in the Tx, and in what they changed at once.
// Commit and Abort cannot fail. Abort is called only after Prepare was, also when that failed, and
// then undoes what Prepare had done by then. The nodes of all actions are held (graph.Hold) from
// before the first Open until after the last Commit, or Clean. Should a node that an action names
// come into being in between, everything is undone and begun anew, with the same actions.
type Action interface {
	// Nodes are to be quiet from before the first Prepare until after the last Clean. Called before
	// Open and after it.
	Nodes() []*graph.Node
	// Prepare checks the action and makes its changes: those of the graph in tx, others in a way
	// that Abort can undo.
	Prepare(ctx context.Context, tx *graph.Tx) error
	// Commit makes the changes final; the graph is as tx left it.
	Commit()
	Abort()
	// Clean gives back what the action has taken; called last in every case.
	Clean()
}

// Opener is an Action with slow work that must not hold up requests: Open does it before anything
// is quiet, and Clean undoes it unless Prepare and Commit made use of it. The sketch, which is
// never committed, is the graph as the actions before will leave it, as far as later Opens rely on
// that; Open adds to it what Prepare is going to do.
type Opener interface {
	Open(ctx context.Context, sketch *graph.Tx) error
}

// Holder is an Action that looks at or changes nodes that need not be quiet: they too are held.
type Holder interface{ Holds() []*graph.Node }

// Starter is an Action that starts a job: after all Commits, with the nodes quiet but not held any
// more, as a job that ends at once holds them itself.
type Starter interface{ Start() }

// Quiescer is an Action that keeps more nodes quiet than QEMU does. Quiesces are those of its Nodes
// that clients know to be quiesced; it is asked last, when the action is done or has failed.
type Quiescer interface{ Quiesces() []*graph.Node }

// Noop is an Action that does nothing, to embed in those that need few of the methods.
type Noop struct{}

// Nodes implements Action.
func (Noop) Nodes() []*graph.Node { return nil }

// Prepare implements Action.
func (Noop) Prepare(context.Context, *graph.Tx) error { return nil }

// Commit implements Action.
func (Noop) Commit() {}

// Abort implements Action.
func (Noop) Abort() {}

// Clean implements Action.
func (Noop) Clean() {}

// Run does all actions or none. The error is that of the first action, in their order, that fails.
// It blocks as long as opening, requests under way and the storage do; waiting ends with ctx.
func Run(ctx context.Context, g *graph.Graph, actions ...Action) error {
	_, err := RunCounting(ctx, g, actions)
	return err
}

// RunCounting is Run that tells how many actions had their turn, the one that failed included.
func RunCounting(ctx context.Context, g *graph.Graph, actions []Action) (turns int, err error) {
	for {
		a := &attempt{g: g, actions: actions}
		turns, err = a.run(ctx)
		if err == nil || !a.missed || ctx.Err() != nil {
			return turns, err
		}
	}
}

// attempt is one go at all actions, on the nodes that they name now.
type attempt struct {
	g          *graph.Graph
	actions    []Action
	hold       *graph.Hold
	sketch, tx *graph.Tx
	undrain    func() // nil: nothing is drained
	missed     bool   // an error may come from a node that was not there yet when hold was taken
}

func (a *attempt) run(ctx context.Context) (turns int, err error) {
	a.hold, err = a.g.Hold(ctx, func() ([]*graph.Node, error) { return nodesOf(a.actions...), nil })
	if err != nil {
		return 0, err
	}
	a.sketch, a.tx = a.g.Begin(ctx), a.g.Begin(ctx)
	a.sketch.Under(a.hold)
	a.tx.Under(a.hold)
	defer a.end()
	opened, openErr := a.open(ctx)
	if err := a.drain(ctx, a.actions[:opened]); err != nil {
		return 0, err
	}
	for _, x := range a.actions[:opened] {
		turns++
		if err = careful(func() error { return x.Prepare(ctx, a.tx) }); err != nil {
			break
		}
	}
	begun := a.actions[:turns]
	if err == nil && openErr != nil {
		// Only now: one before it might have had a reason of its own to fail.
		turns, err = turns+1, openErr
	}
	if err == nil {
		err = a.tx.Commit()
	}
	if err != nil {
		for _, x := range slices.Backward(begun) {
			certain(x, x.Abort)
		}
		return turns, err
	}
	for _, x := range a.actions {
		certain(x, x.Commit)
	}
	a.hold.Release()
	for _, x := range a.actions {
		if s, ok := x.(Starter); ok {
			certain(x, s.Start)
		}
	}
	return turns, nil
}

// open does the slow work of the actions up to the first whose Open fails, and counts them.
func (a *attempt) open(ctx context.Context) (opened int, err error) {
	for i, x := range a.actions {
		if o, ok := x.(Opener); ok {
			if err := careful(func() error { return o.Open(ctx, a.sketch) }); err != nil {
				return i, err
			}
		}
	}
	return len(a.actions), nil
}

// drain quiesces the nodes of the actions that are held. (Prepare will miss the others.)
func (a *attempt) drain(ctx context.Context, actions []Action) (err error) {
	var nodes []*graph.Node
	for _, x := range actions {
		for _, n := range x.Nodes() {
			if a.hold.Has(n) {
				nodes = append(nodes, n)
			}
		}
	}
	if len(nodes) > 0 {
		a.undrain, err = a.g.Drain(ctx, nodes...)
	}
	return err
}

// end cleans up after all actions and lets their nodes go.
func (a *attempt) end() {
	missed := a.sketch.Missed() || a.tx.Missed()
	a.tx.Abort()
	a.sketch.Abort()
	for _, x := range a.actions {
		certain(x, x.Clean)
	}
	if a.undrain != nil {
		a.undrain()
	}
	a.missed = missed && slices.ContainsFunc(nodesOf(a.actions...), func(n *graph.Node) bool { return !a.hold.Has(n) })
	a.hold.Release()
}

// nodesOf are all nodes that the actions name.
func nodesOf(actions ...Action) (l []*graph.Node) {
	for _, x := range actions {
		l = append(l, x.Nodes()...)
		if h, ok := x.(Holder); ok {
			l = append(l, h.Holds()...)
		}
	}
	return l
}

// careful calls an action: a panic is an error of it, and the others are undone.
func careful(f func() error) (err error) {
	defer panics.Into("a step of a transaction", &err)
	return f()
}

// certain calls what of an action cannot fail. After a panic its nodes are in doubt; the other
// actions have their turn.
func certain(x Action, f func()) {
	if err := careful(func() error { f(); return nil }); err != nil {
		for _, n := range nodesOf(x) {
			n.Fail(err)
		}
	}
}
