package geometry

import (
	"errors"
	"fmt"
	"iter"
	"syscall"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/trial"
)

// ended is a job that is over, beside what it has to have done.
type ended struct {
	w         *world
	j         *jobs.Job
	start     []byte         // what the source showed when it began
	bitmap    *bitmap.Bitmap // what the backup's bitmap held then; nil: none
	allocated *bitmap.Bitmap // what the top of the source held itself
	guests    guests
}

// check looks at everything that the sample says something about.
func (e *ended) check() {
	w, failure := e.w, e.j.Err()
	cancelled := failure != nil && failure.Error() == jobs.ErrCancelled.Error()
	misfit := w.Kind == "mirror" && blk.AlignUp(w.Target.Size, 512) != blk.AlignUp(w.Layers[0].Size, 512)
	v2 := w.Kind != "mirror" && w.Kind != "backup" && w.Layers[w.To%len(w.Layers)].V2
	switch {
	case v2 && errors.Is(failure, syscall.ENOTSUP):
		// Version 2 cannot say that what a longer image shows is zeroes.
	case failure != nil && !(cancelled && w.End == "cancel") && !w.struck && !misfit:
		trial.Fail("the job fails: %w", failure)
	case failure == nil && misfit:
		trial.Fail("a target of another size is accepted")
	}
	done := failure == nil
	if q := w.x.Jobs.Query(); done && w.Sync != types.MirrorSyncModeNone && len(q) == 1 {
		if is, total := q[0].CurrentProgress, q[0].TotalProgress; is != total {
			trial.Fail("it ends at %d of %d", is, total)
		}
	}
	trial.Must(e.j.Dismiss())
	trial.Must(e.guests.leave())
	if w.Drive.Mode != "" {
		w.openTarget()
	}
	top := e.top(done)
	w.reopen = top
	if top != "t" || w.Under != "header" {
		trial.In("what guests see", func() { w.shows(top, w.data) })
		if top == "t" && w.Under == "chain" && w.Sync != types.MirrorSyncModeTop {
			w.reopen = ""
		}
	}
	e.bitmaps(done)
	switch {
	case w.Kind == "backup":
		e.backup(done)
	case !done:
	case w.Kind == "mirror":
		e.mirror()
	case w.Kind == "stream":
		e.stream()
	default:
		e.commit()
	}
}

// top is the node that guests use in the end.
func (e *ended) top(done bool) string {
	switch {
	case done && e.w.End == "success" && e.w.Kind == "mirror":
		return "t"
	case done && e.w.End == "success" && e.w.Kind == "active":
		return layer(e.w.To)
	}
	return "l0"
}

// spans are what guests did for certain, or perhaps, as a bitmap.
func (e *ended) spans(granularity int64) (must, may *bitmap.Bitmap) {
	size := blk.AlignUp(e.w.Layers[0].Size, 512)
	must, may = bitmap.New(size, granularity), bitmap.New(size, granularity)
	for _, g := range e.guests {
		for _, s := range g.must {
			e.w.space.setTo(must, s.off, s.n)
		}
		for _, s := range g.may {
			// Whole blocks may be written, of the files' size at most.
			e.w.space.setTo(may, s.off, s.n)
		}
	}
	may.Merge(must)
	return must, may
}

// within checks that a has all of least and nothing beyond most; all of one size.
func within(what string, least, a, most *bitmap.Bitmap) {
	for _, c := range []struct {
		is, among *bitmap.Bitmap
		text      string
	}{{least, a, "dirty"}, {a, most, "clean"}} {
		for off, n := range dirty(c.is) {
			if at, ok := c.among.NextClean(off, off+n); ok {
				trial.Fail("%s: byte %d should be %s", what, at, c.text)
			}
		}
	}
}

// dirty are the dirty ranges of a bitmap.
func dirty(b *bitmap.Bitmap) iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		for off, n, ok := b.NextDirty(0, b.Size()); ok && yield(off, n); off, n, ok = b.NextDirty(off+n, b.Size()) {
		}
	}
}

// bitmaps compares those of the source.
func (e *ended) bitmaps(done bool) {
	w := e.w
	n := w.x.Graph.Node("l0")
	if d := n.Bitmaps().Find("watch"); d != nil && e.top(done) == "l0" {
		must, may := e.spans(w.Watch)
		within("a bitmap that only records", must, d.Bits(), may)
	}
	if e.bitmap == nil {
		return
	}
	d := n.Bitmaps().Find("b")
	if d.Busy() {
		trial.Fail("the backup's bitmap is still busy")
	}
	least, most := e.spans(w.Bitmap)
	switch {
	case w.BitmapMode == types.BitmapSyncModeNever || !done && w.BitmapMode != types.BitmapSyncModeAlways:
		least.Merge(e.bitmap)
		most.Merge(e.bitmap)
	case done && !w.struck:
	case done:
		most.SetAll() // an error that was ignored
	default:
		// What is not in the target, as a power failure would leave it, is dirty; what was not
		// copied, in clusters of the copy, may be.
		most.SetAll()
		if w.Real {
			break
		}
		for off, n := range dirty(e.lost()) {
			for end := off + n; off < end; off += 512 {
				if e.bitmap.Get(off) || w.Sync != types.MirrorSyncModeBitmap {
					least.Set(off, 512)
				}
			}
		}
	}
	within("the backup's bitmap", least, d.Bits(), most)
}

// lost is what a power failure takes from the target: what it does not hold then as the source held
// it at the beginning.
func (e *ended) lost() *bitmap.Bitmap {
	w := e.w
	v := newWorld(w.ctx, w.Sample, "")
	for name, c := range w.medium {
		v.x.Store.Put(name, c.Durable())
	}
	lost := bitmap.New(blk.AlignUp(w.Layers[0].Size, 512), 512)
	var got []byte
	err := trial.Run(func() {
		trial.Must(v.x.Nodes.Add(v.ctx, v.options("t", w.Target, nil)))
		got = v.read("t")
	})
	if err := errors.Join(err, v.x.Close()); err != nil {
		trial.Fail("the target after a power failure: %w", err)
	}
	for i := range e.start {
		if got[i] != e.start[i] {
			lost.Set(w.space.disk(int64(i)), 1)
		}
	}
	return lost
}

// unit is what a copy to the target covers at once.
func (e *ended) unit() int64 {
	w := e.w
	u := max(int64(w.Target.Cluster), 512)
	if w.Kind == "backup" {
		return max(u, 64<<10)
	}
	if w.Granularity > 0 {
		return max(u, w.Granularity)
	}
	return max(u, min(max(u, 4<<10), 64<<10))
}

// untouched checks that the target holds nothing itself where the top of the source had nothing,
// and guests did nothing.
func (e *ended) untouched() {
	w := e.w
	_, may := e.spans(max(512, int64(w.Layers[0].Cluster))) // whose clusters it then has as a whole
	may.Merge(e.allocated)
	most := bitmap.New(may.Size(), e.unit())
	most.Merge(may)
	w.extents("t", func(off int64, x blk.Extent) {
		if at, ok := most.NextClean(off, off+x.N); x.Allocated && ok {
			trial.Fail("the target holds byte %d, which the source has from below", at)
		}
	})
}

func (e *ended) backup(done bool) {
	w := e.w
	got := w.read("t")
	switch {
	case w.Sync == types.MirrorSyncModeNone:
		// What guests changed is there as it was.
		e.touched(got, e.start)
	case !done:
	case w.Sync == types.MirrorSyncModeBitmap, w.Sync == types.MirrorSyncModeIncremental:
		e.equal(got, e.bitmap)
		// The rest is what it was.
		whole := bitmap.New(blk.AlignUp(w.Layers[0].Size, 512), e.unit())
		whole.Merge(e.bitmap)
		for i := range got {
			if !whole.Get(w.space.disk(int64(i))) && got[i] != w.target[i] {
				trial.Fail("byte %d of the target was not to be copied", i)
			}
		}
	default:
		same("the target", got[:len(e.start)], e.start)
		if w.Sync == types.MirrorSyncModeTop {
			e.untouched()
		}
	}
}

// equal compares what a bitmap says with what was there at the beginning.
func (e *ended) equal(got []byte, b *bitmap.Bitmap) {
	for at, n := range dirty(b) {
		for _, s := range e.w.space.of(at, n) {
			end := min(s.off+s.n, int64(len(e.start)))
			same(fmt.Sprintf("the target at %d", e.w.space.disk(s.off)), got[s.off:end], e.start[s.off:end])
		}
	}
}

// touched compares what guests changed for certain.
func (e *ended) touched(got, want []byte) {
	for _, g := range e.guests {
		for _, s := range g.must {
			same(fmt.Sprintf("the target at %d", s.off), got[s.off:s.off+s.n], want[s.off:s.off+s.n])
		}
	}
}

func (e *ended) mirror() {
	w := e.w
	if w.Sync == types.MirrorSyncModeNone {
		e.touched(w.read("t"), w.data)
		return
	}
	if w.Under == "header" {
		w.reopen = "t" // what it has not itself it shows when its backing file is opened
	} else {
		w.shows("t", w.data)
	}
	if w.Sync == types.MirrorSyncModeTop {
		e.untouched()
	}
}

func (e *ended) stream() {
	w := e.w
	b := w.x.Graph.Node("l0").Backing()
	switch {
	case w.To == len(w.Layers) && b != nil:
		trial.Fail("there is still something below")
	case w.To < len(w.Layers) && (b == nil || b.Node().Name() != layer(w.To)):
		trial.Fail("something else lies below than what was to stay")
	}
	e.below(w.To)
}

// below compares layers that the job had nothing to do with.
func (e *ended) below(i int) {
	for ; i < len(e.w.Layers); i++ {
		e.w.shows(layer(i), e.w.layers[i])
	}
}

func (e *ended) commit() {
	w := e.w
	base := layer(w.To)
	e.below(w.To + 1)
	want := w.data
	if w.Kind == "commit" {
		want = w.layers[w.From]
	}
	got := w.read(base)
	if len(got) < len(want) {
		trial.Fail("the base has %d bytes instead of %d", len(got), len(want))
	}
	same("the base", got[:len(want)], want)
}

// finish closes everything, checks the images, and opens what guests used last by its header alone.
func (w *world) finish() {
	for i := range 20 {
		left := false
		for _, n := range w.x.Graph.Topology().Nodes {
			if n.MonitorOwned() {
				left = true
				if err := w.x.Nodes.Del(w.ctx, n.Name()); i == 19 {
					trial.Must(err)
				}
			}
		}
		if !left {
			break
		}
	}
	trial.Must(w.x.Left())
	if w.sound(w.struck || w.Kill > 0); w.reopen == "" {
		return
	}
	trial.Must(w.x.Nodes.Add(w.ctx, w.options(w.reopen, w.layer(w.reopen), nil)))
	w.shows(w.reopen, w.data)
	trial.Must(w.x.Nodes.Del(w.ctx, w.reopen))
}
