package stream_test

import (
	"bytes"
	"context"
	"errors"
	"qblockd/jobs/jobtest"
	"runtime"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// Clusters of 2 MiB are larger than what is copied at once: several workers meet in one.
func TestLargeClusters(t *testing.T) {
	const size, clusterSize = 8 << 20, 2 << 20
	g, sink := drivertest.NewGraphSink(t)
	below := drivertest.AddNode(t, g, "base", drivertest.MemFileOf(bytes.Repeat([]byte{7}, size)))
	file := drivertest.AddNode(t, g, "file", drivertest.NewMemFile(0))
	ref, cs := file.Name(), uint64(clusterSize)
	o := types.BlockdevCreateOptionsQcow2{File: types.BlockdevRef{Reference: &ref}, Size: size, ClusterSize: &cs}
	m := blockdev.New(g, blockdev.Config{Drivers: drivers.All})
	create := m.Creator(&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: &o})
	if err := create(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	top := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "top", DriverName: "qcow2", Kind: graph.Format},
		Children: []drivertest.Child{drivertest.File(file), drivertest.Backing(below)},
		Open:     qcow2.Def.With(&types.BlockdevOptionsQcow2{})})
	top.IO().SetWriteThreshold(1)
	jm := jobs.NewManager(sink, nil)
	release, err := start(g, jm, nil)
	if err != nil {
		t.Fatal(err)
	}
	release()
	j := jm.Get("j")
	select {
	case <-j.Finished():
	case <-time.After(time.Minute):
		t.Fatal("the job hangs")
	}
	if j.Err() != nil {
		t.Fatal(j.Err())
	}
	root := drivertest.AddRoot(t, g, top, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	p := make([]byte, size)
	if err := jobtest.Read(root, 0, p); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, size)) {
		t.Errorf("the content has changed (%v)", err)
	}
	// What a job copies is no write of a client.
	if top.IO().WrHighestOffset() != 0 || top.IO().WriteThreshold() != 1 || file.IO().WrHighestOffset() == 0 {
		t.Errorf("highest offsets %d, %d, threshold %d", top.IO().WrHighestOffset(), file.IO().WrHighestOffset(), top.IO().WriteThreshold())
	}
}

// stuck is a file whose reads wait.
type stuck struct {
	*drivertest.MemFile
	reached chan struct{}
	release chan struct{}
}

func (s *stuck) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	select {
	case s.reached <- struct{}{}:
	default:
	}
	<-s.release
	return s.MemFile.ReadAt(r, v, off, f)
}

// A job that is left behind at the end of the daemon, because its storage does not answer, finds
// the graph closed.
func TestLeftBehind(t *testing.T) {
	g := graph.New(&drivertest.Sink{})
	s := &stuck{drivertest.MemFileOf(bytes.Repeat([]byte{1}, cluster)), make(chan struct{}, 1), make(chan struct{})}
	layer(t, g, "top", 1, drivertest.AddNode(t, g, "base", s))
	m := jobs.NewManager(&drivertest.Sink{}, nil)
	release, err := start(g, m, nil)
	if err != nil {
		t.Fatal(err)
	}
	release()
	<-s.reached
	j := m.Get("j")
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if m.Shutdown(over) == nil || g.Close(over) == nil {
		t.Error("nothing was stuck")
	}
	close(s.release)
	<-j.Finished()
	if err := j.Err(); !errors.Is(err, syscall.ECANCELED) && !errors.Is(err, blk.ErrClosed) {
		t.Errorf("outcome: %v", err)
	}
}

// The job can be seen, and cancelled, while its start waits for the requests of guests.
func TestCancelWhileItStarts(t *testing.T) {
	g, sink := drivertest.NewGraphSink(t)
	base := drivertest.AddNode(t, g, "base", drivertest.MemFileOf(bytes.Repeat([]byte{1}, cluster)))
	top := layer(t, g, "top", 1, base)
	root := drivertest.AddRoot(t, g, top, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m := jobs.NewManager(sink, nil)
	started := make(chan error)
	go func() {
		release, err := start(g, m, nil)
		if err == nil {
			release()
		}
		started <- err
	}()
	for m.Get("j") == nil {
		runtime.Gosched()
	}
	j := m.Get("j")
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	root.End(r)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	<-j.Finished()
	if !errors.Is(j.Err(), syscall.ECANCELED) || top.Backing() == nil || top.Blocked(graph.OpStream) != nil {
		t.Errorf("outcome %v, blocked: %v", j.Err(), top.Blocked(graph.OpStream))
	}
}
