package blockdev

import (
	"runtime"
	"sync"
	"sync/atomic"
	"weak"

	"qblockd/graph"
)

// record is what the manager keeps of a node beside the graph. All fields are replaced as
// wholes; who finds one outdated makes it anew, and several may do so at once.
type record struct {
	auto    atomic.Pointer[autoBacking] // set by the opener, before the node is published
	definer definer
	name    atomic.Pointer[nodeName]
	header  atomic.Pointer[headerName] // nil if nobody has asked for it
	info    atomic.Pointer[nodeInfo]
	actual  atomic.Int64 // bytes allocated as last heard; unknownSize if never
	asking  atomic.Bool  // a worker asks for it now
}

const unknownSize = -1

// definer is the parent whose options or image defined the node, as long as it is one: it hands
// options down. Records keep no node alive.
type definer struct {
	mu sync.Mutex
	of weak.Pointer[graph.Node] // +checklocks:mu
}

func (d *definer) set(n *graph.Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.of = weak.Make(n)
}

// drop makes the node one that nobody defines if n did so far.
func (d *definer) drop(n *graph.Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.of == weak.Make(n) {
		d.of = weak.Pointer[graph.Node]{}
	}
}

func (d *definer) is(n *graph.Node) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.of == weak.Make(n)
}

// autoBacking remembers the backing file that was opened because the image's header said so.
type autoBacking struct {
	header string // what the header said
	opened string // the name of the node that was opened
}

// headerName is what HeaderName said of a node.
type headerName struct {
	gen  uint64 // TreeGeneration that it was made at
	name string
}

// record is the record of n; nodes that others opened (filters of jobs) get one when first asked
// for.
func (t *names) record(n *graph.Node) *record {
	if r := t.recs.get(n); r != nil {
		return r
	}
	return t.recs.add(n, &record{})
}

// autoName is the name that opening n, whose record is r, anew, without options for its backing
// file, would give to that file; "" if none would be opened.
func autoName(n *graph.Node, r *record) string {
	image, ok := n.Driver().(graph.Backed)
	if !ok {
		return ""
	}
	header, _ := image.BackingFile()
	if a := r.auto.Load(); a != nil && a.header == header {
		return a.opened
	}
	return header
}

// records finds the records of nodes. They go with their nodes, and what those hold goes with them:
// nothing here keeps a node.
type records struct {
	mu sync.RWMutex
	of map[weak.Pointer[graph.Node]]*record // +checklocks:mu
}

func (t *records) get(n *graph.Node) *record {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.of[weak.Make(n)]
}

// add enters r unless n has a record already, and returns the one that n has.
func (t *records) add(n *graph.Node, r *record) *record {
	r.actual.Store(unknownSize)
	key := weak.Make(n)
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.of[key]; old != nil {
		return old
	}
	if t.of == nil {
		t.of = map[weak.Pointer[graph.Node]]*record{}
	}
	t.of[key] = r
	runtime.AddCleanup(n, t.forget, key)
	return r
}

func (t *records) remove(nodes ...*graph.Node) {
	for _, n := range nodes {
		t.forget(weak.Make(n))
	}
}

func (t *records) forget(key weak.Pointer[graph.Node]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.of, key)
}
