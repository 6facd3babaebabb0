package mirror_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// hugeWorld has disks of so many bytes with something in a few places, the target too, if old says
// so; with unmap, zeroing the target takes no space.
func hugeWorld(t *testing.T, size int64, old, unmap bool) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, want: make([]byte, 64*granule)}
	w.Events = jobtest.NewEvents()
	w.m = jobs.NewManager(w, nil)
	data, other := bytes.Repeat([]byte("data"), granule/4), bytes.Repeat([]byte("old "), granule/4)
	w.from, w.to = drivertest.NewMemFile(size), drivertest.NewMemFile(size)
	for i := range int64(20) {
		w.from.Poke(place(size, i), data[:granule])
		if old {
			w.to.Poke(place(size, i)+granule/2, other[:granule])
		}
	}
	w.from.Poke(size-5000, data[:5000])
	w.fromF, w.toF = drivertest.NewFault(w.from), drivertest.NewFault(w.to)
	add := func(name string, d graph.Driver, discard bool) *graph.Node {
		o := graph.Options{Name: name, Kind: graph.Protocol}
		return drivertest.MustBuild(t, w.g, drivertest.Spec{Options: o, NoDiscard: !discard, Open: drivertest.Opened(d)})
	}
	w.source, w.target = add("hsource", w.fromF, true), add("htarget", w.toF, unmap)
	w.guest = drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
	w.shape = jobtest.Look(w.g)
	return w
}

// place is the i-th of 20 places in a disk.
func place(size, i int64) int64 { return size / 20 * i / 512 * 512 }

// A mirror of a huge disk takes steps for what is in it, not for what could be, and little memory.
func TestHugeDisks(t *testing.T) {
	for _, size := range []int64{64 << 40, 1 << 61} {
		for _, old := range []bool{false, true} {
			for _, unmap := range []bool{false, true} {
				for _, mode := range modes {
					t.Run(fmt.Sprintf("%d old %v unmap %v %s", size, old, unmap, mode), func(t *testing.T) {
						hugeMirror(t, size, old, unmap, mode, 0)
					})
				}
			}
		}
	}
}

// Nor where little is copied at once, so that a step ends in what only the target holds, with a
// long hole of the source behind.
func TestHugeDisksInSmallSteps(t *testing.T) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) { hugeMirror(t, 1<<36, true, false, mode, granule) })
	}
}

// clustered is a file whose parts of 1 MiB are data as a whole, where anything was written to them
// or they were zeroed in part.
type clustered struct {
	*drivertest.MemFile
	mu    sync.Mutex
	data  map[int64]bool
	asked int
}

const clusterOf = 1 << 20

func (c *clustered) mark(off, n int64, zero bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := off / clusterOf; k*clusterOf < off+n; k++ {
		whole := k*clusterOf >= off && (k+1)*clusterOf <= off+n
		c.data[k] = !zero || !whole && (c.data[k] || zero)
		if !c.data[k] {
			delete(c.data, k)
		}
	}
}

func (c *clustered) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	c.mark(off, v.Len(), false)
	return c.MemFile.WriteAt(r, v, off, f)
}

func (c *clustered) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	c.mark(off, n, true)
	return c.MemFile.Zero(r, off, n, f)
}

func (c *clustered) Status(_ *blk.Req, off, n int64) (blk.Extent, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	k := off / clusterOf
	if c.data[k] {
		return blk.Extent{N: min(n, (k+1)*clusterOf-off), Data: true, Allocated: true}, nil
	}
	for d := range c.data {
		if at := d * clusterOf; at > off {
			n = min(n, at-off)
		}
	}
	return blk.Extent{N: n, Zero: true}, nil
}

// TestHugeDisksAndClusters: where data of the source begin shortly before a cluster of the target,
// the hole behind is not copied in steps that lie across its clusters, each of which made the next
// one data.
func TestHugeDisksAndClusters(t *testing.T) {
	const size = 1 << 38
	w := hugeWorld(t, size, false, true)
	w.from.Poke(1<<31-100, bytes.Repeat([]byte{7}, 200))
	to := &clustered{MemFile: w.to, data: map[int64]bool{}}
	w.target = drivertest.AddNode(t, w.g, "clusters", to)
	j := w.start(w.args(types.MirrorCopyModeBackground))
	if !w.Await(ready) {
		t.Fatal(j.Err())
	}
	j.Cancel(false)
	<-j.Finished()
	if !w.from.Same(w.to) {
		t.Error("the target differs")
	}
	if to.asked > 2000 || len(to.data) > 100 {
		t.Errorf("%d questions for the status of ranges, %d clusters of data", to.asked, len(to.data))
	}
}

func hugeMirror(t *testing.T, size int64, old, unmap bool, mode types.MirrorCopyMode, bufSize int64) {
	w := hugeWorld(t, size, old, unmap)
	a := w.args(mode)
	a.BufSize = &bufSize
	j := w.start(a)
	if !w.Await(ready) {
		t.Fatal(j.Err())
	}
	if info := w.m.QueryBlock()[0]; info.Offset != info.Len || info.Len != size {
		t.Errorf("progress %d of %d", info.Offset, info.Len)
	}
	for i := range int64(20) {
		if err := jobtest.Write(w.guest, place(size, i)+granule*3, bytes.Repeat([]byte{byte(i)}, 5000)); err != nil {
			t.Fatal(err)
		}
	}
	if used := w.source.Bitmaps().All()[0].Bits().Memory(); used > 1<<20 {
		t.Errorf("the bitmap takes %d bytes", used)
	}
	if err := j.Complete(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-j.Finished()
	if err := j.Err(); err != nil {
		t.Error(err)
	}
	if !w.from.Same(w.to) {
		t.Error("the target differs")
	}
	if n := w.from.Statuses.Load() + w.to.Statuses.Load(); n > 2000 {
		t.Errorf("%d questions for the status of ranges", n)
	}
	if n := w.to.Writes.Load() + w.to.Zeros.Load(); n > 500 {
		t.Errorf("%d writes", n)
	}
}

// A huge disk of zeroes that is written to while it is passed over: nothing is lost, and no unit of
// work goes on for long.
func TestGuestsInLongZeroes(t *testing.T) {
	for round := range 4 {
		w := hugeWorld(t, 1<<50, false, false)
		a := w.args(modes[round%2])
		stop := w.guests(w.guest)
		j := w.start(a)
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		stop()
		if err := j.Complete(context.Background()); err != nil {
			t.Fatal(err)
		}
		<-j.Finished()
		if err := j.Err(); err != nil || !w.from.Same(w.to) {
			t.Errorf("round %d: %v, the same %v", round, err, w.from.Same(w.to))
		}
	}
}
