package jobs

import (
	"cmp"
	"context"
	"slices"

	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs/machine"
	"qblockd/jobs/visible"
)

// Show lets clients see the pauses in passing of a moment (package visible) that concerns the
// nodes. They are only told: a job's next unit of work waits at its closed gate in any case.
func (m *Manager) Show(at visible.Moment, nodes ...*graph.Node) {
	m.pauseInPassing(at, m.concerned(at, nodes))
}

// Around is Show for a moment that concerns the nodes as they are before f and after it, also if f
// fails.
func (m *Manager) Around(at visible.Moment, nodes func() []*graph.Node, f func() error) error {
	before := m.concerned(at, nodes())
	err := f()
	m.pauseInPassing(at, appendNew(before, m.concerned(at, nodes())))
	return err
}

// Transaction is transaction.Run for commands that clients see to quiesce the graph, also if they
// fail.
func (m *Manager) Transaction(ctx context.Context, g *graph.Graph, actions ...transaction.Action) error {
	const ends = visible.TransactionEnds
	m.Show(visible.TransactionBegins)
	near := map[*graph.Node][]*Job{} // as it is now
	for _, a := range actions {
		for _, n := range a.Nodes() {
			near[n] = m.concerned(ends, []*graph.Node{n})
		}
	}
	turns, err := transaction.RunCounting(ctx, g, actions)
	var seen []*Job
	for _, a := range actions[:turns] {
		nodes := a.Nodes
		if q, ok := a.(transaction.Quiescer); ok {
			nodes = q.Quiesces
		}
		for _, n := range nodes() {
			seen = appendNew(seen, near[n])
		}
	}
	m.pauseInPassing(ends, seen)
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

// concerned are the jobs that a moment concerns.
func (m *Manager) concerned(at visible.Moment, nodes []*graph.Node) []*Job {
	var near map[string]bool
	all := at.All()
	if !all {
		if len(nodes) == 0 {
			return nil
		}
		near = map[string]bool{}
		for _, r := range nodes[0].Graph().RootsAbove(nodes...) {
			if r.Spec().Kind == graph.KindJob {
				near[r.Spec().Name] = true
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(m.jobs), func(j *Job) bool { return !all && !near[j.id] })
}

// pauseInPassing lets those of the jobs that are at work show themselves paused and going on, as
// often as the moment has it.
func (m *Manager) pauseInPassing(at visible.Moment, l []*Job) {
	if len(l) == 0 {
		return
	}
	spans := spansOf(l)
	for range at.Pairs() {
		m.mu.Lock()
		for _, j := range m.pauseLocked(l, spans) {
			j.stepLocked(machine.LeavePause)
		}
		m.mu.Unlock()
	}
}

// pauseLocked lets the jobs that are at work show themselves paused, and returns them: all are
// paused before the first goes on, in the order in which QEMU quiesces nodes. A job is paused with
// the oldest of its nodes, and goes on with the newest.
// +checklocks:m.mu
func (m *Manager) pauseLocked(l []*Job, spans map[*Job]span) (goOn []*Job) {
	for _, j := range l {
		atWork := j.st.Status == machine.Running || j.st.Status == machine.Ready
		if atWork && j.st.Started && !j.st.Ended && !j.st.ShouldPause() && !j.st.Forced {
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
