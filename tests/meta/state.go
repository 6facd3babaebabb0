package meta

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// state is what was recorded, by its keys: a model of the graph that nothing but changes makes.
type state struct {
	mu sync.Mutex
	of map[graph.Key]any // +checklocks:mu
}

// record is the graph.Recorder. It keeps to what a journal relies on: what goes was there.
func (s *state) record(l []graph.Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range l {
		if _, there := s.of[c.Key]; c.Value == nil && !there {
			panic(fmt.Sprintf("%s goes, and was not there", c.Key))
		}
		if c.Value == nil {
			delete(s.of, c.Key)
		} else {
			s.of[c.Key] = c.Value
		}
	}
	return nil
}

// recorded compares what was recorded with what is there. A change shows a moment after it was
// recorded, and jobs make some at any time: what differs has to be the same soon.
func (w *world) recorded() {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		told := w.state.replayed()
		is := w.queried()
		w.addJobs(told, is)
		diff := differences(told, is)
		switch {
		case diff == "":
			return
		case time.Now().After(end):
			trial.Fail("what is recorded is not what is there:%s", diff)
		}
	}
}

// replayed is what would be made again: exports on the nodes that they showed last.
func (s *state) replayed() map[graph.Key]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := maps.Clone(s.of)
	for k, v := range l {
		if o, ok := v.(*types.BlockExportOptions); ok {
			again := *o
			k.Part = "root"
			again.NodeName = s.of[k].(graph.EdgeState).Child
			l[graph.Key{Kind: k.Kind, Name: k.Name}] = &again
		}
	}
	return l
}

func differences(recorded, there map[graph.Key]any) string {
	var diff strings.Builder
	all := maps.Clone(recorded)
	maps.Copy(all, there)
	byName := func(a, b graph.Key) int { return strings.Compare(a.String(), b.String()) }
	for _, k := range slices.SortedFunc(maps.Keys(all), byName) {
		r, known := recorded[k]
		if t, is := there[k]; known != is || !reflect.DeepEqual(r, t) {
			fmt.Fprintf(&diff, "\n\t%s: recorded %+v, there is %+v", k, r, t)
		}
	}
	return diff.String()
}

// queried is the state as it shows, without jobs.
func (w *world) queried() map[graph.Key]any {
	is := map[graph.Key]any{}
	t := w.x.Graph.Topology()
	for _, n := range t.Nodes {
		is[graph.Key{Kind: graph.StateNode, Name: n.Name()}] = graph.StateOf(n)
		for _, b := range n.Bitmaps().States() {
			if b.Name != "" {
				is[graph.Key{Kind: graph.StateBitmap, Name: n.Name(), Part: b.Name}] = &types.BlockDirtyBitmapAdd{
					Node: n.Name(), Name: b.Name, Granularity: rig.Ptr(uint32(b.Granularity)),
					Persistent: &b.Persistent, Disabled: rig.Ptr(!b.Recording)}
			}
		}
	}
	for _, e := range t.Edges {
		var k graph.Key
		if n := e.Edge.ParentNode(); n != nil {
			k = graph.Key{Kind: graph.StateNode, Name: n.Name()}
		} else if of := e.Edge.ParentRoot().Spec().Of; of != nil && of.Key().Kind == graph.StateExport {
			k = of.Key()
		} else {
			continue
		}
		k.Part = e.Edge.ChildName()
		is[k] = graph.EdgeState{Child: e.Node.Name(), Role: e.Edge.Role()}
	}
	for _, o := range w.x.Exports.Options() {
		is[graph.Key{Kind: graph.StateExport, Name: o.ID}] = o
	}
	return is
}

// addJobs adds the arguments of jobs to what is there. Those of one at work are to be recorded,
// those of one that has ended are not; of one in between they may be.
func (w *world) addJobs(recorded, is map[graph.Key]any) {
	for _, i := range w.x.Jobs.QueryBlock() {
		k := graph.Key{Kind: graph.StateJob, Name: i.Device}
		switch j := w.x.Jobs.Get(i.Device); i.Status {
		case types.JobStatusConcluded, types.JobStatusNull:
		case types.JobStatusCreated, types.JobStatusAborting:
			if v, ok := recorded[k]; ok {
				is[k] = v
			}
		default:
			if j != nil {
				// What it was told since it started is compared with what queries show.
				s := j.Record().Value().(jobs.State)
				s.Speed, s.Paused = i.Speed, s.Paused && j.UserPaused()
				is[k] = s
			}
		}
	}
}
