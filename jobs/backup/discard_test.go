package backup_test

import (
	"bytes"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/filter/snapshotaccess"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/jobs/backup"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// fleeced is a world whose source is a point in time of a disk that a guest has written to all
// over, so that all of it is in fleece; the target can lose its power.
type fleeced struct {
	*world
	medium *drivertest.CrashFile
	fleece *drivertest.Fault
}

func newFleeced(t *testing.T) *fleeced {
	content := noise(1)
	for i := range content {
		content[i] |= 1 // zeroes need not be given up
	}
	f := &fleeced{medium: drivertest.NewCrashFile(size), fleece: drivertest.NewFault(drivertest.NewMemFile(size))}
	f.world = newWorldOf(t, drivertest.MemFileOf(bytes.Clone(content)), f.medium, content)
	copies := drivertest.MustBuild(t, f.g, drivertest.Spec{
		Options: graph.Options{Name: "fleece", Kind: graph.Protocol, Discard: true}, Open: drivertest.Opened(f.fleece),
	})
	cbw := drivertest.MustBuild(t, f.g, drivertest.Spec{
		Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
		Children: []drivertest.Child{drivertest.FilteredFile(f.source), {Name: "target", Role: perm.Data, Node: copies}},
		Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
	})
	err := f.g.Do(t.Context(), func(tx *graph.Tx) error { return tx.Replace(f.guest.Edge(), cbw) })
	if err != nil {
		t.Fatal(err)
	}
	f.source = drivertest.MustBuild(t, f.g, drivertest.Spec{
		Options:  graph.Options{Name: "sa", DriverName: "snapshot-access", Kind: graph.Format, Discard: true},
		Children: []drivertest.Child{{Name: "file", Role: perm.Data | perm.Primary, Node: cbw}},
		Open:     snapshotaccess.Def.With(&types.BlockdevOptionsGenericFormat{}),
	})
	if err := jobtest.Write(f.guest, 0, bytes.Repeat([]byte{0xee}, size)); err != nil {
		t.Fatal(err)
	}
	f.shape = jobtest.Look(f.g)
	return f
}

func (f *fleeced) backUp() *jobs.Job {
	a := f.args()
	a.DiscardSource = new(true)
	return f.start(a)
}

// kept requires that each cluster is still in the point in time, or, if the power fails now, in the
// target; it returns how many are not in the point in time.
func (f *fleeced) kept() (given int) {
	f.t.Helper()
	reader := drivertest.AddRoot(f.t, f.g, f.source, perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	stored, p := f.medium.Durable().Bytes(), make([]byte, cluster)
	for off := int64(0); off < size; off += cluster {
		want := f.want[off : off+cluster]
		if jobtest.Read(reader, off, p) == nil {
			if !bytes.Equal(p, want) {
				f.t.Fatalf("the point in time has changed at %#x", off)
			}
			continue
		}
		given++
		if !bytes.Equal(stored[off:off+cluster], want) {
			f.t.Fatalf("%#x is neither in the point in time nor on stable storage in the target", off)
		}
	}
	return given
}

// TestDiscardSource: what was copied is given up, in the course of the job, and never before it is
// on stable storage in the target.
func TestDiscardSource(t *testing.T) {
	defer backup.GiveUpAfter(8 * cluster)()
	f := newFleeced(t)
	var given atomic.Int64
	f.fleece.Hook(func(op drivertest.Op, off, n int64) {
		if op != drivertest.OpDiscard {
			return
		}
		given.Add(n)
		if got := f.medium.Durable().Bytes()[off : off+n]; !bytes.Equal(got, f.want[off:off+n]) {
			t.Errorf("%#x is given up before it is stored", off)
		}
	})
	early := int64(0)
	f.toF.Hook(func(op drivertest.Op, _, _ int64) {
		if op == drivertest.OpWrite {
			early = max(early, given.Load())
		}
	})
	if err := f.end(f.backUp()); err != nil {
		t.Fatal(err)
	}
	if given.Load() != size || early == 0 {
		t.Errorf("%d bytes were given up, %d before the last write", given.Load(), early)
	}
	f.fleece.Hook(nil)
	if n := f.kept(); n != size/cluster {
		t.Errorf("%d clusters were given up", n)
	}
}

// TestDiscardSourceFails: whatever fails, nothing of the point in time is lost.
func TestDiscardSourceFails(t *testing.T) {
	defer backup.GiveUpAfter(8 * cluster)()
	for _, side := range []string{"target", "fleece"} {
		for i := 0; ; i++ {
			f := newFleeced(t)
			file := map[string]*drivertest.Fault{"target": f.toF, "fleece": f.fleece}[side]
			file.FailAt(i, syscall.EIO)
			err := f.end(f.backUp())
			passed := file.Failed() == 0
			file.Clear()
			if passed && err != nil {
				t.Fatal(err)
			}
			if given := f.kept(); passed && given != size/cluster {
				t.Errorf("%d clusters were given up", given)
			}
			if passed {
				break
			}
		}
	}
}

// TestDiscardSourceUnflushed: a target that cannot be flushed makes the source keep everything; the
// copy counts as it does without flushing.
func TestDiscardSourceUnflushed(t *testing.T) {
	f := newFleeced(t)
	f.toF.Inject(drivertest.Rule{Ops: drivertest.OpFlush})
	if err := f.end(f.backUp()); err != nil {
		t.Error(err)
	}
	if given := f.kept(); given != 0 {
		t.Errorf("%d clusters were given up", given)
	}
}

// TestDiscardSourceRefused: of a disk that others use nothing is given up.
func TestDiscardSourceRefused(t *testing.T) {
	w := newWorld(t)
	a := w.args()
	a.DiscardSource = new(true)
	err := w.g.Do(t.Context(), func(tx *graph.Tx) error {
		s := w.step(a)
		defer s.Clean()
		defer s.Abort()
		return s.Prepare(t.Context(), tx)
	})
	if want := fmt.Sprintf("Node '%s' keeps no point in time", w.source.Name()); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Error(err)
	}
	if now := jobtest.Look(w.g); now != w.shape {
		t.Errorf("the graph is\n%s, it was\n%s", now, w.shape)
	}
}
