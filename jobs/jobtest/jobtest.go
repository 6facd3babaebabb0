// Package jobtest is what the worlds have in common that tests of jobs build: images in memory,
// guests, the events of jobs, and what of a job is left in the graph.
package jobtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Events keeps the events that it is sent.
type Events struct {
	mu   sync.Mutex
	all  []events.Event // +checklocks:mu
	more *sync.Cond
}

// NewEvents makes one that has none.
func NewEvents() *Events {
	l := &Events{}
	l.more = sync.NewCond(&l.mu)
	return l
}

// Emit implements events.Sink.
func (l *Events) Emit(e events.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, e)
	l.more.Broadcast()
}

// Await waits for an event that satisfies is, also one that has come already, or for the end of a
// job; it tells which.
func (l *Events) Await(is func(e events.Event) bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 0; ; i++ {
		for i >= len(l.all) {
			l.more.Wait()
		}
		if is(l.all[i]) {
			return true
		}
		if InState(types.JobStatusConcluded)(l.all[i]) {
			return false
		}
	}
}

// All are the events so far.
func (l *Events) All() []events.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// InState tells of an event whether a job has come to that state.
func InState(s types.JobStatus) func(e events.Event) bool {
	return func(e events.Event) bool {
		c, ok := e.(types.JobStatusChangeEvent)
		return ok && c.Status == s
	}
}

// Finish waits for the end of a job, dismisses it, and returns its outcome. The files fail no more.
func Finish(t testing.TB, j *jobs.Job, files ...*drivertest.Fault) error {
	t.Helper()
	select {
	case <-j.Finished():
	case <-time.After(time.Minute):
		t.Fatal("the job hangs")
	}
	for _, f := range files {
		f.Clear()
	}
	err := j.Err()
	if e := j.Dismiss(); e != nil {
		t.Error(e)
	}
	return err
}

// Look is the graph as a text: edges, claims, bitmaps, what headers name, blocked operations.
func Look(g *graph.Graph) string {
	var s strings.Builder
	topology := g.Topology()
	for _, e := range topology.Edges {
		fmt.Fprintf(&s, "%s -%s-> %s %v frozen %v\n",
			e.Edge.Parent().Describe(), e.Edge.ChildName(), e.Node.Name(), e.Claim, e.Edge.Frozen())
	}
	for _, n := range topology.Nodes {
		fmt.Fprintf(&s, "%s ro %v", n.Name(), n.ReadOnly())
		for _, b := range n.Bitmaps().All() {
			fmt.Fprintf(&s, " bitmap '%s' busy %v enabled %v", b.Name(), b.Busy(), b.Enabled())
		}
		if b, ok := n.Driver().(graph.Backed); ok {
			name, format := b.BackingFile()
			fmt.Fprintf(&s, " over '%s' %s", name, format)
		}
		for op := graph.OpBackupSource; op <= graph.OpReplace; op++ {
			if err := n.Blocked(op); err != nil {
				fmt.Fprintf(&s, " %v", err)
			}
		}
		s.WriteString("\n")
	}
	return s.String()
}

// Layer makes a qcow2 image of size bytes in the file, over backing if that is not nil, and opens
// it under that name.
func Layer(t testing.TB, g *graph.Graph, name string, file graph.Driver, size int64, backing *graph.Node) *graph.Node {
	t.Helper()
	below := drivertest.AddNode(t, g, name+"-file", file)
	o := types.BlockdevCreateOptionsQcow2{File: types.BlockdevRef{Reference: new(below.Name())}, Size: uint64(size)}
	kids := []drivertest.Child{drivertest.File(below)}
	if backing != nil {
		o.BackingFile, o.BackingFmt = new(backing.Name()), new(types.BlockdevDriverQcow2)
		kids = append(kids, drivertest.Backing(backing))
	}
	create := blockdev.New(g, blockdev.Config{Drivers: drivers.All}).Creator(
		&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: &o})
	if err := create(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: name, DriverName: "qcow2", Kind: graph.Format},
		Children: kids, Open: qcow2.Def.With(&types.BlockdevOptionsQcow2{}),
	})
}

// Visit calls f with a guest that writes to n, and goes after that.
func Visit(t testing.TB, n *graph.Node, f func(guest *graph.Root) error) {
	t.Helper()
	ctx, g := context.Background(), n.Graph()
	tx := g.Begin(ctx)
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
	if err := errors.Join(err, tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f(root), g.CloseRoot(ctx, root)); err != nil {
		t.Fatal(err)
	}
}

// unit calls f in a unit of work of root.
func unit(root *graph.Root, f func(r *blk.Req) error) error {
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	return f(r)
}

// Write writes p as a guest does.
func Write(root *graph.Root, off int64, p []byte) error {
	return unit(root, func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(p), off, 0) })
}

// Zero zeroes a range as a guest does.
func Zero(root *graph.Root, off, n int64) error {
	return unit(root, func(r *blk.Req) error { return root.Zero(r, off, n, 0) })
}

// Discard discards a range as a guest does.
func Discard(root *graph.Root, off, n int64) error {
	return unit(root, func(r *blk.Req) error { return root.Discard(r, off, n) })
}

// Read reads into p as a guest does.
func Read(root *graph.Root, off int64, p []byte) error {
	return unit(root, func(r *blk.Req) error { return root.ReadAt(r, blk.Buf(p), off, 0) })
}
