package graph_test

import (
	"errors"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// ejected is a driver whose image has turned out to be unusable.
type ejected struct{ *drivertest.MemFile }

func (ejected) Ejected() bool { return true }

// A discard that would do nothing anyway still tells that there is no medium any more.
func TestDiscardOfEjected(t *testing.T) {
	g := drivertest.NewGraph(t)
	file := drivertest.NewMemFileOptions(1<<20, drivertest.MemOptions{Limits: blk.Limits{RequestAlign: 512}})
	root := attach(t, g, drivertest.AddNode(t, g, "n", ejected{file}))
	r, err := root.Begin(within(t))
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	if err := root.Discard(r, 0, 1); !errors.Is(err, blk.ErrNoMedium) {
		t.Errorf("a discard of nothing: %v", err)
	}
}
