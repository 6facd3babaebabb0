package copybeforewrite_test

import (
	"bytes"
	"encoding/binary"
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

// inUse is a disk that a guest writes to, with a filter above it that is not in use.
type inUse struct {
	g                 *graph.Graph
	disk, target, cbw *graph.Node
	guest             *graph.Root // above disk, until the filter is put in
	fault             *drivertest.Fault
}

func newInUse(t *testing.T, o types.BlockdevOptionsCbw, diskSize, targetSize int64) *inUse {
	g := drivertest.NewGraph(t)
	u := &inUse{g: g, fault: drivertest.NewFault(drivertest.NewMemFile(targetSize))}
	u.disk = drivertest.AddNode(t, g, "disk", drivertest.NewMemFile(diskSize))
	u.target = drivertest.AddNode(t, g, "target", u.fault)
	u.guest = drivertest.AddRoot(t, g, u.disk, drivertest.Writer)
	u.cbw = drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(u.disk), {Name: "target", Role: perm.Data, Node: u.target}},
		Open:     copybeforewrite.Def.With(&o),
	})
	return u
}

// move lets the guest write to n from now on.
func (u *inUse) move(t *testing.T, n *graph.Node) {
	t.Helper()
	if err := u.g.Do(t.Context(), func(tx *graph.Tx) error { return tx.Replace(u.guest.Edge(), n) }); err != nil {
		t.Fatal(err)
	}
}

func (u *inUse) write(off int64, p []byte) error {
	return unit(u.guest, func(r *blk.Req) error { return u.guest.WriteAt(r, blk.Buf(p), off, 0) })
}

// view opens the point in time.
func (u *inUse) view(g *graph.Graph) (*graph.Node, error) {
	return drivertest.Build(g, drivertest.Spec{
		Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format, ReadOnly: true},
		Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: u.cbw}},
		Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
	})
}

// read reads the whole point in time.
func (u *inUse) read(t *testing.T) ([]byte, error) {
	t.Helper()
	sa, err := u.view(u.g)
	if err != nil {
		t.Fatal(err)
	}
	root, err := u.g.AddRoot(t.Context(), graph.RootSpec{
		EdgeName: "root", Ctx: t.Context(), Claim: perm.Claim{Need: perm.ConsistentRead, Share: perm.All},
	}, sa)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, root.Size())
	err = unit(root, func(r *blk.Req) error { return root.ReadAt(r, blk.Buf(got), 0, 0) })
	err = errors.Join(err, u.g.CloseRoot(t.Context(), root),
		u.g.Do(t.Context(), func(tx *graph.Tx) error { return tx.Delete("sa") }))
	return got, err
}

// TestPutIn: the point in time of a filter that is put into a disk in use is that moment: it has
// all that was written before and nothing of what came later, whatever the guest was doing.
func TestPutIn(t *testing.T) {
	const blocks = size / 512
	u := newInUse(t, types.BlockdevOptionsCbw{}, size, size)
	stop, done, begun := make(chan struct{}), make(chan error, 1), make(chan struct{})
	place := func(seq int) int { return seq * 37 % blocks } // 37 and blocks have no common divisor
	go func() {
		for seq := 1; ; seq++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if seq == 2*blocks {
				close(begun)
			}
			p := make([]byte, 512)
			binary.LittleEndian.PutUint64(p, uint64(seq))
			if err := u.write(int64(place(seq))*512, p); err != nil {
				done <- fmt.Errorf("write %d: %w", seq, err)
				return
			}
		}
	}()
	<-begun
	if _, err := u.view(u.g); !errors.As(err, new(*perm.Conflict)) {
		t.Errorf("a view of what writes pass by: %v", err)
	}
	for range 3 { // out again, too: nothing was copied yet, or a new filter is needed
		u.move(t, u.cbw)
		first, err := u.read(t)
		if err != nil {
			t.Fatal(err)
		}
		last := uint64(0)
		for i := range blocks {
			last = max(last, binary.LittleEndian.Uint64(first[i*512:]))
		}
		for seq := last; seq > last-blocks; seq-- {
			if got := binary.LittleEndian.Uint64(first[place(int(seq))*512:]); got != seq {
				t.Fatalf("write %d is in the point in time, %d is not: %d instead", last, seq, got)
			}
		}
		second, err := u.read(t)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("the point in time has changed (%v)", err)
		}
		u.move(t, u.disk)
		u.renew(t)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// renew makes another filter in place of the one that is out of use.
func (u *inUse) renew(t *testing.T) {
	t.Helper()
	if err := u.g.Do(t.Context(), func(tx *graph.Tx) error { return tx.Delete("cbw") }); err != nil {
		t.Fatal(err)
	}
	u.cbw = drivertest.MustBuild(t, u.g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(u.disk), {Name: "target", Role: perm.Data, Node: u.target}},
		Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
	})
}

// TestPutInAgain: a filter that was out of use goes on with its point in time if nothing was
// written past it, begins one if nothing was copied, and else has none any more.
func TestPutInAgain(t *testing.T) {
	for _, copied := range []bool{false, true} {
		for _, past := range []bool{false, true} {
			t.Run(fmt.Sprintf("copied=%v,past=%v", copied, past), func(t *testing.T) {
				u := newInUse(t, types.BlockdevOptionsCbw{}, size, size)
				want := make([]byte, size)
				u.move(t, u.cbw)
				if copied {
					if err := u.write(cluster, []byte("copied")); err != nil {
						t.Fatal(err)
					}
				}
				u.move(t, u.disk)
				if past {
					if err := u.write(2*cluster, []byte("past")); err != nil {
						t.Fatal(err)
					}
					copy(want[2*cluster:], "past")
				}
				u.move(t, u.cbw)
				if err := u.write(3*cluster, []byte("later")); err != nil {
					t.Fatal(err)
				}
				got, err := u.read(t)
				switch {
				case copied && past:
					if !errors.Is(err, syscall.EACCES) {
						t.Errorf("a mixture of two points in time is read: %v", err)
					}
				case err != nil || !bytes.Equal(got, want):
					t.Errorf("not what was there (%v)", err)
				}
			})
		}
	}
}

// TestPutInAfterResize: the size of the disk may change while the filter is out of use.
func TestPutInAfterResize(t *testing.T) {
	for _, c := range []struct {
		name   string
		target int64
		size   int64
		broken bool
	}{
		{"grown", 2 * size, size + 5*cluster, false},
		{"shrunk", size, 3*cluster + 512, false},
		{"beyond the target", size, size + 5*cluster, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newInUse(t, types.BlockdevOptionsCbw{}, size, c.target)
			if err := u.guest.Edge().Resize(t.Context(), c.size, true, blk.PreallocOff); err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{7}, int(c.size))
			if err := u.write(0, want); err != nil {
				t.Fatal(err)
			}
			u.move(t, u.cbw)
			if err := u.write(c.size-512, []byte("later")); err != nil {
				t.Fatal(err)
			}
			got, err := u.read(t)
			switch {
			case c.broken && !errors.Is(err, syscall.EACCES):
				t.Error(err)
			case !c.broken && (err != nil || !bytes.Equal(got, want)):
				t.Errorf("not what was there (%v)", err)
			}
		})
	}
}

// TestPutInTargetFails: whom a target that fails hits, the guest or the readers.
func TestPutInTargetFails(t *testing.T) {
	spoil := types.OnCbwErrorBreakSnapshot
	for _, o := range []types.BlockdevOptionsCbw{{}, {OnCbwError: &spoil}} {
		u := newInUse(t, o, size, size)
		u.move(t, u.cbw)
		u.fault.Inject(drivertest.Rule{Ops: drivertest.OpModify, Err: syscall.ENOSPC})
		err := u.write(0, []byte("new"))
		u.fault.Clear()
		got, readErr := u.read(t)
		if o.OnCbwError == nil {
			if !errors.Is(err, syscall.ENOSPC) || readErr != nil || !bytes.Equal(got, make([]byte, size)) {
				t.Errorf("guest: %v; reader: %v", err, readErr)
			}
		} else if err != nil || !errors.Is(readErr, syscall.EACCES) {
			t.Errorf("guest: %v; reader: %v", err, readErr)
		}
	}
}
