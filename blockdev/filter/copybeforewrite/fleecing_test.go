package copybeforewrite_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// overlay is a target to which nothing was written yet: it reads its backing child.
type overlay struct {
	*drivertest.MemFile
	node *graph.Node
}

func (o *overlay) ReadAt(r *blk.Req, v blk.Vec, off int64, _ blk.Flags) error {
	return o.node.Backing().ReadAt(r, v, off, 0)
}

// TestReadersOfTarget: who reads the source through the target has what was there before a guest
// changes it: the guest's write waits for that read.
func TestReadersOfTarget(t *testing.T) {
	g := drivertest.NewGraph(t)
	was := bytes.Repeat([]byte{1}, size)
	held := drivertest.NewFault(drivertest.MemFileOf(bytes.Clone(was)))
	disk := drivertest.AddNode(t, g, "disk", held)
	mem := drivertest.NewMemFile(size)
	target := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "target", Kind: graph.Format}, Children: []drivertest.Child{drivertest.Backing(disk)},
		Open: func(x *driver.Opening) (graph.Driver, error) { return &overlay{mem, x.Node}, nil },
	})
	cbw := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
		Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
	})
	guest, reader := drivertest.AddRoot(t, g, cbw, drivertest.Writer), drivertest.AddRoot(t, g, target, drivertest.Reader)
	begun, let := make(chan struct{}), make(chan struct{})
	held.Hook(func(op drivertest.Op, _, _ int64) {
		if op == drivertest.OpRead {
			begun <- struct{}{}
			<-let
		}
	})
	got, read := make([]byte, 512), make(chan error)
	go func() {
		read <- unit(reader, func(r *blk.Req) error { return reader.ReadAt(r, blk.Buf(got), cluster, 0) })
	}()
	<-begun
	held.Hook(nil)
	write := func(ctx context.Context, off int64) error {
		return unit(guest, func(r *blk.Req) error {
			r.Ctx = ctx
			return guest.WriteAt(r, blk.Buf(bytes.Repeat([]byte{2}, 512)), off, 0)
		})
	}
	gaveUp, giveUp := context.WithCancel(context.Background())
	giveUp() // who has to wait fails
	if err := write(gaveUp, cluster+4096); !errors.Is(err, context.Canceled) {
		t.Errorf("a write to a cluster that is being read through the target: %v", err)
	}
	if err := write(gaveUp, 3*cluster); err != nil {
		t.Errorf("a write elsewhere: %v", err)
	}
	close(let)
	if err := <-read; err != nil || !bytes.Equal(got, was[:512]) {
		t.Errorf("the reader has %d: %v", got[0], err)
	}
	err := write(context.Background(), cluster)
	if err != nil || !bytes.Equal(mem.Bytes()[cluster:2*cluster], was[:cluster]) {
		t.Errorf("a write afterwards: %v", err)
	}
}
