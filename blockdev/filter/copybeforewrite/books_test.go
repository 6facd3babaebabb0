package copybeforewrite

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// TestBooksAreBounded: a guest that writes all over a huge disk gets an error when the books of
// what was copied become too large; what was acknowledged is copied, and the memory is bounded.
func TestBooksAreBounded(t *testing.T) {
	const size, most = int64(1) << 61, 1 << 20
	defer func(was int64) { maxBooks = was }(maxBooks)
	maxBooks = most
	g := drivertest.NewGraph(t)
	from, to := drivertest.NewMemFile(size), drivertest.NewMemFile(size)
	source, target := drivertest.AddNode(t, g, "source", from), drivertest.AddNode(t, g, "target", to)
	var d *Driver
	filter := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "filter", Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(source), {Name: "target", Role: perm.Data, Node: target}},
		Open: func(o *driver.Opening) (graph.Driver, error) {
			d = New(o.Node, size, minCluster, false)
			d.Pending().SetAll()
			d.Access().SetAll()
			return d, nil
		},
	})
	root := drivertest.AddRoot(t, g, filter, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	for i := int64(0); ; i++ {
		if i == 10000 {
			t.Fatal("no end of it")
		}
		if err := root.WriteAt(r, blk.Buf(make([]byte, 512)), i<<45, 0); err != nil {
			if !errors.Is(err, syscall.ENOMEM) {
				t.Error(err)
			}
			break
		}
		if !d.Copied().Get(i << 45) {
			t.Fatalf("the write at %d was acknowledged and not copied before", i<<45)
		}
	}
	if used := d.Pending().Memory() + d.Copied().Memory(); used > most+most/8 {
		t.Errorf("the books take %d bytes", used)
	}
	// Where there are books already, it goes on.
	if err := root.WriteAt(r, blk.Buf(make([]byte, 512)), 1024, 0); err != nil {
		t.Error(err)
	}
}
