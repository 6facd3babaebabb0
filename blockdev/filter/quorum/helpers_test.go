package quorum

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// copies is a quorum of files in memory, each of which can fail.
type copies struct {
	g      *graph.Graph
	sink   *drivertest.Sink
	node   *graph.Node
	files  []*drivertest.MemFile
	faults []*drivertest.Fault
	told   int // events that were looked at
}

func build(t testing.TB, g *graph.Graph, n int, size int64, ro bool, o types.BlockdevOptionsQuorum) *copies {
	t.Helper()
	c := &copies{g: g}
	spec := drivertest.Spec{
		Options: graph.Options{Name: "q", DriverName: "quorum", Kind: graph.Format, ReadOnly: ro}, Open: Def.With(&o),
	}
	for i := range n {
		f := drivertest.NewMemFile(size)
		c.files = append(c.files, f)
		c.faults = append(c.faults, drivertest.NewFault(f))
		spec.Children = append(spec.Children, drivertest.Child{Name: edgeName(i), Role: perm.Data,
			Node: drivertest.MustBuild(t, g, drivertest.Spec{
				Options: graph.Options{Name: fmt.Sprint("c", i), Kind: graph.Protocol}, Open: drivertest.Opened(c.faults[i])})})
		o.Children = append(o.Children, nil)
	}
	if err := check(&o); err != nil {
		t.Fatal(err)
	}
	c.node = drivertest.MustBuild(t, g, spec)
	return c
}

func newCopies(t testing.TB, n int, size int64, o types.BlockdevOptionsQuorum) *copies {
	t.Helper()
	g, sink := drivertest.NewGraphSink(t)
	c := build(t, g, n, size, false, o)
	c.sink = sink
	return c
}

// guest is somebody who reads and writes.
type guest struct {
	*graph.Root
	r *blk.Req
}

func (c *copies) guest(t testing.TB) guest {
	t.Helper()
	root := drivertest.AddRoot(t, c.g, c.node, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return guest{root, r}
}

func (g guest) read(off, n int64) ([]byte, error) {
	b := make([]byte, n)
	return b, g.ReadAt(g.r, blk.Buf(b), off, 0)
}

// events are those since the last call, in words.
func (c *copies) events() string {
	var l []string
	all := c.sink.Events()
	for _, e := range all[c.told:] {
		l = append(l, inWords(e))
	}
	c.told = len(all)
	return strings.Join(l, ", ")
}

func inWords(e events.Event) string {
	switch e := e.(type) {
	case *types.QuorumReportBadEvent:
		s := fmt.Sprintf("%s %s %d+%d", e.NodeName, e.Type, e.SectorNum, e.SectorsCount)
		if e.Error != nil {
			s += " " + *e.Error
		}
		return s
	case *types.QuorumFailureEvent:
		return fmt.Sprintf("%s failed %d+%d", e.Reference, e.SectorNum, e.SectorsCount)
	}
	return e.EventName()
}
