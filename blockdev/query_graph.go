package blockdev

import (
	"slices"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// DebugGraph is the answer to x-debug-query-block-graph: backends, jobs and nodes with the edges
// between them, numbered in the order in which a walk meets them: backends, jobs, nodes from the
// oldest, each with the edges below it. The lists are the wrong way round, as QEMU's are.
// ids are the block jobs that there are, newest first, also those that use nothing any more.
func (q *queries) DebugGraph(ids ...string) *types.XDbgBlockGraph {
	w := &graphWalk{ids: map[graph.Parent]uint64{}, below: map[graph.Parent][]graph.EdgeInfo{}}
	t := q.g.Topology()
	var backends, jobs []*graph.Root // newest first
	jobOf := map[string]*graph.Root{}
	for _, r := range t.Roots {
		switch r.Spec().Kind {
		case graph.KindBackend:
			backends = append(backends, r)
		case graph.KindJob: // all roots of a job are one vertex
			if jobOf[r.Spec().Name] == nil {
				jobOf[r.Spec().Name] = r
				jobs = append(jobs, r)
			}
		}
	}
	for _, e := range t.Edges {
		var parent graph.Parent = e.Edge.ParentNode()
		if r := e.Edge.ParentRoot(); r != nil {
			parent = r
			if r.Spec().Kind == graph.KindJob {
				parent = jobOf[r.Spec().Name]
			}
		}
		w.below[parent] = append(w.below[parent], e)
	}
	for _, r := range slices.Backward(backends) {
		w.vertex(r)
	}
	for _, id := range ids {
		if r := jobOf[id]; r != nil {
			w.vertex(r)
			jobs = slices.DeleteFunc(jobs, func(x *graph.Root) bool { return x == r })
		} else {
			w.vertex(endedJob(id))
		}
	}
	for _, r := range jobs {
		w.vertex(r)
	}
	for _, n := range slices.Backward(t.Nodes) {
		w.vertex(n)
	}
	slices.Reverse(w.out.Nodes)
	slices.Reverse(w.out.Edges)
	return &w.out
}

// endedJob is the ID of a job that has no nodes.
type endedJob string

// Describe implements graph.Parent.
func (j endedJob) Describe() string { return "job '" + string(j) + "'" }

// GraphNode implements graph.Parent.
func (j endedJob) GraphNode() (types.XDbgBlockGraphNodeType, string) { return graph.KindJob, string(j) }

type graphWalk struct {
	ids   map[graph.Parent]uint64
	below map[graph.Parent][]graph.EdgeInfo
	out   types.XDbgBlockGraph
}

func (w *graphWalk) id(v graph.Parent) uint64 {
	id, ok := w.ids[v]
	if !ok {
		id = uint64(len(w.ids) + 1)
		w.ids[v] = id
	}
	return id
}

func (w *graphWalk) vertex(v graph.Parent) {
	kind, name := v.GraphNode()
	w.out.Nodes = append(w.out.Nodes, &types.XDbgBlockGraphNode{ID: w.id(v), Type: kind, Name: name})
	for _, e := range w.below[v] {
		w.out.Edges = append(w.out.Edges, &types.XDbgBlockGraphEdge{
			Parent:     w.id(v),
			Child:      w.id(e.Node),
			Name:       e.Edge.ChildName(),
			Perm:       permissions(e.Claim.Need),
			SharedPerm: permissions(e.Claim.Share),
		})
	}
}

// permissions lists p, the last in the schema's order first.
func permissions(p perm.Perm) []types.BlockPermission {
	l := []types.BlockPermission{}
	for _, x := range []struct {
		bit  perm.Perm
		name types.BlockPermission
	}{
		{perm.Resize, types.BlockPermissionResize},
		{perm.WriteUnchanged, types.BlockPermissionWriteUnchanged},
		{perm.Write, types.BlockPermissionWrite},
		{perm.ConsistentRead, types.BlockPermissionConsistentRead},
	} {
		if p&x.bit != 0 {
			l = append(l, x.name)
		}
	}
	return l
}
