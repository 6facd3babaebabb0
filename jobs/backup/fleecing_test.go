package backup_test

import (
	"bytes"
	"context"
	"errors"
	"qblockd/jobs/jobtest"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
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

// TestReadersOfTarget: who reads the point in time through a target above the source is waited for
// by the guest that is about to change it.
func TestReadersOfTarget(t *testing.T) {
	w := newWorld(t)
	target := drivertest.MustBuild(t, w.g, drivertest.Spec{
		Options: graph.Options{Name: "over", Kind: graph.Format}, Children: []drivertest.Child{drivertest.Backing(w.source)},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			return &overlay{drivertest.NewMemFile(size), x.Node}, nil
		},
	})
	reader := drivertest.AddRoot(t, w.g, target, drivertest.Reader)
	a := w.args()
	a.Target, a.Sync = target.Name(), types.MirrorSyncModeNone
	j := w.start(a)
	begun, let := make(chan struct{}), make(chan struct{})
	w.fromF.Hook(func(op drivertest.Op, _, _ int64) {
		if op == drivertest.OpRead {
			begun <- struct{}{}
			<-let
		}
	})
	got, read := make([]byte, cluster), make(chan error)
	go func() { read <- jobtest.Read(reader, 0, got) }()
	<-begun
	w.fromF.Hook(nil)
	r, err := w.guest.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ctx, giveUp := context.WithCancel(context.Background())
	giveUp() // who has to wait fails
	r.Ctx = ctx
	if err := w.guest.WriteAt(r, blk.Buf(bytes.Repeat([]byte{2}, 512)), 0, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a write to a cluster that is being read through the target: %v", err)
	}
	w.guest.End(r)
	close(let)
	if err := <-read; err != nil || !bytes.Equal(got, w.want[:cluster]) {
		t.Errorf("the reader has something else: %v", err)
	}
	_ = j.Cancel(false)
	<-j.Finished()
	if err := j.Dismiss(); err != nil {
		t.Error(err)
	}
}
