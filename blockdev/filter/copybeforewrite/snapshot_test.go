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
		Open: func(x *graph.Opening) (graph.Driver, error) {
			x.Options = &o
			return copybeforewrite.Open(x)
		},
	})
	sa := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format},
		Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}}, Open: snapshotaccess.Open,
	})
	f.guest = drivertest.AddRoot(t, g, cbw, drivertest.Writer)
	f.reader = drivertest.AddRoot(t, g, sa, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
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

// What is read is what was there, wherever guests write, zero or discard at the same time; what is said to be zero was.
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
