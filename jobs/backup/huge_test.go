package backup_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

func hugeWorld(t *testing.T, size int64) *world {
	g, sink := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, m: jobs.NewManager(sink, nil)}
	data := bytes.Repeat([]byte("data"), cluster/4)
	w.from, w.to = drivertest.NewMemFile(size), drivertest.NewMemFile(size)
	for i := range int64(20) {
		w.from.Poke(place(size, i), data[:cluster])
	}
	w.from.Poke(size-5000, data[:5000])
	w.fromF, w.toF = drivertest.NewFault(w.from), drivertest.NewFault(w.to)
	w.source, w.target = drivertest.AddNode(t, w.g, "hsource", w.fromF), drivertest.AddNode(t, w.g, "htarget", w.toF)
	w.guest = drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
	w.shape = jobtest.Look(w.g)
	return w
}

// place is the i-th of 20 places in a disk.
func place(size, i int64) int64 { return size / 20 * i / 512 * 512 }

// A backup of a huge disk takes steps for what is in it, or in the bitmap, not for what could be,
// and little memory.
func TestHugeDisks(t *testing.T) {
	for _, size := range []int64{64 << 40, 1 << 61} {
		for _, sync := range []types.MirrorSyncMode{types.MirrorSyncModeFull, types.MirrorSyncModeBitmap} {
			for _, granularity := range []int64{512, 64 << 10, 2 << 20} {
				name := fmt.Sprintf("%d %s %d", size, sync, granularity)
				t.Run(name, func(t *testing.T) { hugeBackup(t, size, sync, granularity) })
			}
		}
	}
}

func hugeBackup(t *testing.T, size int64, sync types.MirrorSyncMode, granularity int64) {
	w := hugeWorld(t, size)
	b, err := w.source.Bitmaps().New(graph.DirtyBitmapSpec{Name: "b", Granularity: granularity})
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(20) {
		b.Bits().Set(place(size, i), cluster)
	}
	b.Bits().Set(size-5000, 5000)
	w.shape = jobtest.Look(w.g)
	want := w.from.Clone()
	a := w.args()
	a.Sync = sync
	if sync == types.MirrorSyncModeBitmap {
		a.Bitmap, a.BitmapMode = new(b.Name()), new(types.BitmapSyncModeOnSuccess)
	}
	s := w.step(a)
	if err := transaction.Run(context.Background(), w.g, s); err != nil {
		t.Fatal(err)
	}
	// Guests come first, and beside the job.
	written := make(chan error, 1)
	write := func(from, to int64) {
		for i := from; i < to; i++ {
			if err := jobtest.Write(w.guest, place(size, i)+100, bytes.Repeat([]byte{byte(i)}, 5000)); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}
	write(0, 10)
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	go write(10, 20)
	s.Release()
	if err := w.end(w.m.Get("j")); err != nil {
		t.Error(err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	if !want.Same(w.to) {
		t.Error("the target differs")
	}
	if n := w.from.Statuses.Load() + w.to.Statuses.Load(); n > 2000 {
		t.Errorf("%d questions for the status of ranges", n)
	}
	if used := b.Bits().Memory(); used > 1<<20 {
		t.Errorf("the bitmap takes %d bytes", used)
	}
}
