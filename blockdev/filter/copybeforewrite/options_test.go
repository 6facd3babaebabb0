package copybeforewrite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/filter/snapshotaccess"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// slow is a disk whose writes take until they are let go.
type slow struct {
	*drivertest.MemFile
	begun, let chan struct{}
}

func (s *slow) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	s.begun <- struct{}{}
	<-s.let
	return s.MemFile.WriteAt(r, v, off, f)
}

func do(t *testing.T, root *graph.Root, f func(r *blk.Req) error) error {
	t.Helper()
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	return f(r)
}

// TestTimeout: a write waits a second for a copy that takes longer; then it fails, or the point in
// time is spoilt. The copy goes on, and a drain waits for it.
func TestTimeout(t *testing.T) {
	for _, mode := range []types.OnCbwError{types.OnCbwErrorBreakGuestWrite, types.OnCbwErrorBreakSnapshot} {
		t.Run(string(mode), func(t *testing.T) {
			g := drivertest.NewGraph(t)
			was := bytes.Repeat([]byte{1}, size)
			disk := drivertest.AddNode(t, g, "disk", drivertest.MemFileOf(bytes.Clone(was)))
			s := &slow{drivertest.NewMemFile(size), make(chan struct{}, 10), make(chan struct{})}
			target := drivertest.AddNode(t, g, "target", s)
			second := uint32(1)
			cbw := drivertest.MustBuild(t, g, drivertest.Spec{
				Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
				Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
				Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{OnCbwError: &mode, CbwTimeout: &second}),
			})
			sa := drivertest.MustBuild(t, g, drivertest.Spec{
				Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format},
				Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}},
				Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
			})
			guest := drivertest.AddRoot(t, g, cbw, drivertest.Writer)
			reader := drivertest.AddRoot(t, g, sa, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
			write := func() error {
				return do(t, guest, func(r *blk.Req) error { return guest.WriteAt(r, blk.Buf(bytes.Repeat([]byte{2}, 512)), 0, 0) })
			}
			read := func() (byte, error) {
				b := make([]byte, 512)
				err := do(t, reader, func(r *blk.Req) error { return reader.ReadAt(r, blk.Buf(b), 0, 0) })
				return b[0], err
			}
			err := write()
			<-s.begun
			if mode == types.OnCbwErrorBreakSnapshot {
				if err != nil {
					t.Fatal(err)
				}
				if _, err := read(); !errors.Is(err, syscall.EACCES) {
					t.Errorf("the point in time is spoilt, but reads give %v", err)
				}
			} else if !errors.Is(err, syscall.ETIMEDOUT) {
				t.Fatal(err)
			}
			drained := make(chan error)
			go func() {
				undrain, err := g.Drain(context.Background(), cbw)
				if err == nil {
					undrain()
				}
				drained <- err
			}()
			select {
			case <-drained:
				t.Error("a drain did not wait for the copy")
			default:
			}
			close(s.let)
			if err := <-drained; err != nil {
				t.Fatal(err)
			}
			if err := write(); err != nil {
				t.Fatal(err)
			}
			if mode == types.OnCbwErrorBreakGuestWrite {
				if b, err := read(); b != 1 || err != nil {
					t.Errorf("the point in time has %d: %v", b, err)
				}
			}
		})
	}
}

// TestPart: only what is in a bitmap is part of the point in time.
func TestPart(t *testing.T) {
	g := drivertest.NewGraph(t)
	disk := drivertest.AddNode(t, g, "disk", drivertest.MemFileOf(bytes.Repeat([]byte{1}, 8*cluster)))
	d, err := disk.Bitmaps().New(graph.DirtyBitmapSpec{Name: "b", Granularity: cluster, Disabled: true})
	if err != nil {
		t.Fatal(err)
	}
	d.Bits().Set(2*cluster, cluster)
	mem := drivertest.NewMemFile(8 * cluster)
	target := drivertest.AddNode(t, g, "target", mem)
	cbw := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
		Open: copybeforewrite.Def.With(&types.BlockdevOptionsCbw{
			Bitmap: &types.BlockDirtyBitmap{Node: "disk", Name: "b"},
		}),
	})
	sa := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format},
		Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}},
		Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
	})
	d.Bits().SetAll() // later changes of the bitmap are none of the point in time
	guest := drivertest.AddRoot(t, g, cbw, drivertest.Writer)
	reader := drivertest.AddRoot(t, g, sa, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	for c := range 8 {
		if err := do(t, guest, func(r *blk.Req) error {
			return guest.WriteAt(r, blk.Buf(bytes.Repeat([]byte{2}, cluster)), int64(c*cluster), 0)
		}); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, cluster)
		err := do(t, reader, func(r *blk.Req) error { return reader.ReadAt(r, blk.Buf(b), int64(c*cluster), 0) })
		if c == 2 && (err != nil || b[0] != 1) || c != 2 && !errors.Is(err, syscall.EACCES) {
			t.Errorf("cluster %d: %d, %v", c, b[0], err)
		}
		if copied := mem.Bytes()[c*cluster] != 0; copied != (c == 2) {
			t.Errorf("cluster %d was copied: %v", c, copied)
		}
	}
}

// TestGuestFlush: what guests flush is the disk. The target may be slow, or fail.
func TestGuestFlush(t *testing.T) {
	g := drivertest.NewGraph(t)
	disk, file := drivertest.MemFileOf(bytes.Repeat([]byte{1}, size)), drivertest.NewMemFile(size)
	target := drivertest.NewFault(file)
	target.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
	cbw := drivertest.MustBuild(t, g, drivertest.Spec{
		Options: graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(drivertest.AddNode(t, g, "disk", disk)),
			{Name: "target", Role: perm.Data, Node: drivertest.AddNode(t, g, "target", target)}},
		Open: copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
	})
	defer target.Clear()
	guest := drivertest.AddRoot(t, g, cbw, drivertest.Writer)
	err := do(t, guest, func(r *blk.Req) error {
		return errors.Join(guest.WriteAt(r, blk.Buf(make([]byte, 512)), 0, 0), guest.Flush(r))
	})
	if err != nil || disk.Flushes.Load() != 1 || file.Writes.Load() == 0 {
		t.Errorf("%v; the disk was flushed %d times", err, disk.Flushes.Load())
	}
}

// TestShortTarget: a point in time that the target could not hold is none.
func TestShortTarget(t *testing.T) {
	g := drivertest.NewGraph(t)
	disk := drivertest.AddNode(t, g, "disk", drivertest.NewMemFile(2*cluster))
	target := drivertest.AddNode(t, g, "target", drivertest.NewMemFile(cluster))
	_, err := drivertest.Build(g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
		Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
	})
	want := fmt.Sprintf("Target 'target' of %d bytes is too small for 'disk' of %d bytes", cluster, 2*cluster)
	if err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
