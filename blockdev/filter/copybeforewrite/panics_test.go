package copybeforewrite

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// TestPanicGivesBack: a copy that ends in a panic is over, and its clusters are to do again; nobody
// waits for it for ever.
func TestPanicGivesBack(t *testing.T) {
	defer panics.Contain()()
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	const size = 4 * minCluster
	g := graph.New(&drivertest.Sink{})
	t.Cleanup(func() { _ = g.Close(context.Background()) }) // the node that has failed says so
	var d *Driver
	filter := drivertest.MustBuild(t, g, drivertest.Spec{ // without a target, which it takes for granted
		Options:  graph.Options{Name: "filter", Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(drivertest.AddNode(t, g, "source", drivertest.NewMemFile(size)))},
		Open: func(o *driver.Opening) (graph.Driver, error) {
			d = New(o.Node, size, minCluster, false)
			d.Pending().SetAll()
			return d, nil
		},
	})
	root := drivertest.AddRoot(t, g, filter, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	var internal *panics.Error
	if err := root.WriteAt(r, blk.Buf(make([]byte, 512)), 0, 0); !errors.As(err, &internal) {
		t.Errorf("a guest's write: %v", err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		d.SkipZeroes(r, 0, size)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := d.Stop(ctx); err != nil {
		t.Fatalf("somebody still copies: %v", err)
	}
	if n := d.Pending().Count(); n != size || !d.Copied().Empty() {
		t.Errorf("%d bytes are to do", n)
	}
}
