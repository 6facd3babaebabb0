package copybeforewrite_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
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

const (
	cluster = 64 << 10
	size    = 40*cluster + 3*512
)

// fleece is a disk under the filter, with a guest and a reader of the point in time.
type fleece struct {
	was           []byte
	target        *drivertest.Fault
	guest, reader *graph.Root
	g             *graph.Graph
	sa, cbw       *graph.Node
}

func newFleece(t *testing.T, o types.BlockdevOptionsCbw) *fleece {
	g := drivertest.NewGraph(t)
	f := &fleece{was: make([]byte, size), target: drivertest.NewFault(drivertest.NewMemFile(size))}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range f.was {
		if i/cluster%5 != 2 {
			f.was[i] = byte(r.Uint32())
		}
	}
	disk := drivertest.AddNode(t, g, "disk", drivertest.MemFileOf(bytes.Clone(f.was)))
	target := drivertest.AddNode(t, g, "target", f.target)
	cbw := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
		Open:     copybeforewrite.Def.With(&o),
	})
	sa := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format, Discard: true},
		Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}},
		Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
	})
	f.guest = drivertest.AddRoot(t, g, cbw, drivertest.Writer)
	f.reader = drivertest.AddRoot(t, g, sa, perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All})
	f.g, f.sa, f.cbw = g, sa, cbw
	return f
}

func unit(root *graph.Root, f func(r *blk.Req) error) error {
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	return f(r)
}

func (f *fleece) write(off int64, p []byte) error {
	return unit(f.guest, func(r *blk.Req) error { return f.guest.WriteAt(r, blk.Buf(p), off, 0) })
}

// What is read is what was there, wherever guests write, zero or discard at the same time; what is
// said to be zero was.
func TestFleecing(t *testing.T) {
	f := newFleece(t, types.BlockdevOptionsCbw{})
	stop := make(chan struct{})
	var guests, readers sync.WaitGroup
	for g := range 3 {
		guests.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 3))
			p := bytes.Repeat([]byte{0xee}, 2*cluster)
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := 512 * (1 + r.Int64N(int64(len(p))/512))
				off := 512 * r.Int64N((size-n)/512+1)
				err := unit(f.guest, func(q *blk.Req) error {
					switch r.IntN(4) {
					case 0:
						return f.guest.Zero(q, off, n, blk.MayUnmap)
					case 1:
						return f.guest.Discard(q, off, n)
					default:
						return f.guest.WriteAt(q, blk.Buf(p[:n]), off, 0)
					}
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for g := range 3 {
		readers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 4))
			p := make([]byte, 3*cluster)
			for range 400 {
				n := 1 + r.Int64N(int64(len(p)))
				off := r.Int64N(size - n)
				var x blk.Extent
				err := unit(f.reader, func(q *blk.Req) (err error) {
					if x, err = f.reader.Status(q, off, n); err != nil {
						return err
					}
					return f.reader.ReadAt(q, blk.Buf(p[:n]), off, 0)
				})
				if err != nil || !bytes.Equal(p[:n], f.was[off:off+n]) || x.Zero && !blk.IsZero(f.was[off:off+x.N]) {
					t.Errorf("at %d: %v, or not what was there", off, err)
					return
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	guests.Wait()
}

// A copy that fails costs the guest its write, or the reader the point in time, as asked.
func TestFailingCopy(t *testing.T) {
	f := newFleece(t, types.BlockdevOptionsCbw{})
	f.target.Inject(drivertest.Rule{Ops: drivertest.OpModify, Count: 2})
	read := func(f *fleece) error {
		p := make([]byte, size)
		err := unit(f.reader, func(r *blk.Req) error { return f.reader.ReadAt(r, blk.Buf(p), 0, 0) })
		if err == nil && !bytes.Equal(p, f.was) {
			t.Error("not what was there")
		}
		return err
	}
	if err := f.write(cluster, []byte("new")); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	f.target.Clear()
	if err := errors.Join(read(f), f.write(cluster, []byte("new")), read(f)); err != nil {
		t.Error(err)
	}
	spoil := types.OnCbwErrorBreakSnapshot
	f = newFleece(t, types.BlockdevOptionsCbw{OnCbwError: &spoil})
	f.target.Inject(drivertest.Rule{Ops: drivertest.OpModify, Count: 2})
	if err := f.write(cluster, []byte("new")); err != nil {
		t.Error(err)
	}
	f.target.Clear()
	if err := read(f); !errors.Is(err, syscall.EACCES) {
		t.Error(err)
	}
}

// A discard gives up whole clusters of the point in time: they cannot be read any more and are not
// copied; all else is as it was.
func TestDiscardedSnapshot(t *testing.T) {
	f := newFleece(t, types.BlockdevOptionsCbw{})
	discard := func(off, n int64) error {
		return unit(f.reader, func(r *blk.Req) error { return f.reader.Discard(r, off, n) })
	}
	read := func(off int64, p []byte) error {
		return unit(f.reader, func(r *blk.Req) error { return f.reader.ReadAt(r, blk.Buf(p), off, 0) })
	}
	last := int64(size) / cluster * cluster
	for _, d := range [][2]int64{{cluster, 2 * cluster}, {5*cluster + 512, cluster}, {last, size - last}} {
		if err := discard(d[0], d[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.write(0, bytes.Repeat([]byte{0xee}, size)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, cluster)
	for off := int64(0); off < size; off += cluster {
		b := p[:min(cluster, size-off)]
		err := read(off, b)
		switch gone := off == cluster || off == 2*cluster || off == last; {
		case gone && !errors.Is(err, syscall.EACCES):
			t.Errorf("at %#x: %v", off, err)
		case !gone && (err != nil || !bytes.Equal(b, f.was[off:off+int64(len(b))])):
			t.Errorf("at %#x: not what was there (%v)", off, err)
		}
	}
	if err := discard(0, size+512); !errors.Is(err, blk.ErrOutOfRange) {
		t.Errorf("beyond the end: %v", err)
	}
}

// What is above a filter that goes fails; it does not end the daemon.
func TestSnapshotWithoutKeeper(t *testing.T) {
	f := newFleece(t, types.BlockdevOptionsCbw{})
	tx := f.g.Begin(t.Context())
	defer tx.Abort()
	if err := tx.Replace(f.sa.File(), f.cbw.Child("target").Node()); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	err := unit(f.reader, func(r *blk.Req) error {
		_, err := f.reader.Status(r, 0, size)
		return errors.Join(err, f.reader.ReadAt(r, blk.Buf(make([]byte, 512)), 0, 0), f.reader.Discard(r, 0, size))
	})
	if !errors.Is(err, blk.ErrNotSupported) {
		t.Error(err)
	}
}

// TestSnapshotBelowFilter: another filter that is put above the one with the point in time does not
// come between it and its readers.
func TestSnapshotBelowFilter(t *testing.T) {
	f := newFleece(t, types.BlockdevOptionsCbw{})
	tx := f.g.Begin(t.Context())
	defer tx.Abort()
	top, err := tx.NewNode(&graph.Options{Name: "top", DriverName: copybeforewrite.DriverName, Kind: graph.Filter})
	if err != nil {
		t.Fatal(err)
	}
	another := copybeforewrite.New(top, size, cluster, false)
	another.Access().SetAll()
	top.SetDriver(another)
	if _, err := tx.InsertFilter(top, "file", f.cbw); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tx.Publish(top), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if above, reads := f.guest.Node(), f.sa.File().Node(); above != top || reads != f.cbw {
		t.Errorf("guests are above %s, the point in time is read from %s", above.Name(), reads.Name())
	}
	got := make([]byte, size)
	err = errors.Join(
		f.write(cluster, bytes.Repeat([]byte{0xee}, cluster)),
		unit(f.reader, func(r *blk.Req) error { return f.reader.ReadAt(r, blk.Buf(got), 0, 0) }))
	if err != nil || !bytes.Equal(got, f.was) {
		t.Errorf("the point in time has changed: %v", err)
	}
}
