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
	auto atomic.Pointer[autoBacking] // set by the opener, before the node is published
	// definer is the parent whose options or image defined the node, a weak.Pointer[graph.Node], as
	// long as it is one: it hands options down.
	definer atomic.Value
	name    atomic.Pointer[nodeName]
	header  atomic.Pointer[headerName] // nil if nobody has asked for it
	info    atomic.Pointer[nodeInfo]
	actual  atomic.Int64 // bytes allocated as last heard; unknownSize if never
	asking  atomic.Bool  // a worker asks for it now
}

const unknownSize = -1

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

// autoName is the name that opening n, whose record is r, anew, without options for its backing
// file, would give to that file; "" if none would be opened.
func autoName(n *graph.Node, r *record) string {
	header, _ := backingFile(n)
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

// record is the record of n, made when first asked for.
func (t *records) record(n *graph.Node) *record {
	key := weak.Make(n)
	t.mu.RLock()
	r := t.of[key]
	t.mu.RUnlock()
	if r != nil {
		return r
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if r = t.of[key]; r == nil {
		r = &record{}
		r.actual.Store(unknownSize)
		t.of[key] = r
		runtime.AddCleanup(n, t.forget, key)
	}
	return r
}

func (t *records) forget(key weak.Pointer[graph.Node]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.of, key)
}
