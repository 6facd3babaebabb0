package jobs

import (
	"cmp"
	"context"
	"slices"

	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs/machine"
)

// Transaction is transaction.Run for commands that clients see to quiesce the graph: every job that
// is at work then is paused in passing, and once more if it reaches one of the nodes, also if the
// command fails; as in QEMU. (The pauses are only told: a job's next unit of work waits at its
// closed gate in any case.)
func (m *Manager) Transaction(ctx context.Context, g *graph.Graph, actions ...transaction.Action) error {
	m.mu.Lock()
	before := slices.Clone(m.jobs)
	m.mu.Unlock()
	m.pauseInPassing(before)
	near := map[*graph.Node][]*Job{} // as it is now
	for _, a := range actions {
		for _, n := range a.Nodes() {
			near[n] = m.near(g, n)
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
	m.pauseInPassing(seen)
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

// Quiescing runs f, which clients see to quiesce the nodes, as they are before it and after it: every
// job that reaches one of them and is at work is paused in passing, also if f fails.
func (m *Manager) Quiescing(g *graph.Graph, nodes func() []*graph.Node, f func() error) error {
	near := m.near(g, nodes()...)
	err := f()
	m.pauseInPassing(appendNew(near, m.near(g, nodes()...)))
	return err
}

// Quiesced tells clients that the nodes were quiet for a moment, as often as QEMU has them so: every
// job that reaches one of them and is at work is paused in passing each time. What happens here in
// such a moment needs no job to pause.
func (m *Manager) Quiesced(times int, nodes ...*graph.Node) {
	if len(nodes) == 0 {
		return
	}
	near := m.near(nodes[0].Graph(), nodes...)
	for range times {
		m.pauseInPassing(near)
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

// pauseInPassing lets the jobs that are at work show themselves paused and going on.
func (m *Manager) pauseInPassing(l []*Job) {
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

// pauseLocked lets the jobs that are at work show themselves paused, and returns them: all are paused
// before the first goes on, in the order in which QEMU quiesces nodes. A job is paused with the
// oldest of its nodes, and goes on with the newest.
// +checklocks:m.mu
func (m *Manager) pauseLocked(l []*Job, spans map[*Job]span) (goOn []*Job) {
	for _, j := range l {
		s := j.st.Status
		if (s == machine.Running || s == machine.Ready) && j.st.Started && !j.st.Ended && !j.st.ShouldPause() && !j.st.Forced {
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
