package geometry

import (
	"errors"
	"fmt"
	"syscall"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// ended is a job that is over, beside what it has to have done.
type ended struct {
	w         *world
	j         *jobs.Job
	start     []byte         // what the source showed when it began
	bitmap    *bitmap.Bitmap // what the backup's bitmap held then; nil: none
	allocated *bitmap.Bitmap // what the top of the source held itself
	guests    []*guest
	graph     string
}

// check looks at everything that the sample says something about.
func (e *ended) check() error {
	w, failure := e.w, e.j.Err()
	cancelled := failure != nil && failure.Error() == jobs.ErrCancelled.Error()
	misfit := w.Kind == "mirror" && blk.AlignUp(w.Target.Size, 512) != blk.AlignUp(w.Layers[0].Size, 512)
	switch {
	case failure != nil && w.Kind != "mirror" && w.Kind != "backup" && w.Layers[w.To%len(w.Layers)].V2 && errors.Is(failure, syscall.ENOTSUP):
		// Version 2 cannot say that what a longer image shows is zeroes.
	case failure != nil && !(cancelled && w.End == "cancel") && !w.struck && !misfit:
		return fmt.Errorf("the job fails: %w", failure)
	case failure == nil && misfit:
		return errors.New("a target of another size is accepted")
	}
	done := failure == nil
	if q := w.x.Jobs.Query(); done && w.Sync != types.MirrorSyncModeNone && len(q) == 1 && q[0].CurrentProgress != q[0].TotalProgress {
		return fmt.Errorf("it ends at %d of %d", q[0].CurrentProgress, q[0].TotalProgress)
	}
	if err := e.j.Dismiss(); err != nil {
		return err
	}
	if err := w.leave(e.guests); err != nil {
		return err
	}
	if w.Drive.Mode != "" {
		if err := w.openTarget(); err != nil {
			return err
		}
	}
	top := e.top(done)
	if top == "t" && w.Under == "header" {
		w.reopen = top
	} else if err := w.shows(top, w.data); err != nil {
		return fmt.Errorf("what guests see: %w", err)
	} else if w.reopen = top; top == "t" && w.Under == "chain" && w.Sync != types.MirrorSyncModeTop {
		w.reopen = ""
	}
	if err := e.bitmaps(done); err != nil {
		return err
	}
	switch {
	case w.Kind == "backup":
		return e.backup(done)
	case !done:
		return nil
	case w.Kind == "mirror":
		return e.mirror()
	case w.Kind == "stream":
		return e.stream()
	}
	return e.commit()
}

// top is the node that guests use in the end.
func (e *ended) top(done bool) string {
	switch {
	case done && e.w.End == "success" && e.w.Kind == "mirror":
		return "t"
	case done && e.w.End == "success" && e.w.Kind == "active":
		return fmt.Sprintf("l%d", e.w.To)
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

// within tells whether a has all of least and nothing beyond most; all of one size.
func within(what string, least, a, most *bitmap.Bitmap) error {
	for _, c := range []struct {
		is, among *bitmap.Bitmap
		text      string
	}{{least, a, "dirty"}, {a, most, "clean"}} {
		for off, n, ok := c.is.NextDirty(0, a.Size()); ok; off, n, ok = c.is.NextDirty(off+n, a.Size()) {
			if at, ok := c.among.NextClean(off, off+n); ok {
				return fmt.Errorf("%s: byte %d should be %s", what, at, c.text)
			}
		}
	}
	return nil
}

// bitmaps compares those of the source.
func (e *ended) bitmaps(done bool) error {
	w := e.w
	n := w.x.Graph.Node("l0")
	if d := n.DirtyBitmap("watch"); d != nil && !(w.Kind == "mirror" && e.top(done) == "t" || w.Kind == "active" && e.top(done) != "l0") {
		must, may := e.spans(w.Watch)
		if err := within("a bitmap that only records", must, d.Bits(), may); err != nil {
			return err
		}
	}
	if e.bitmap == nil {
		return nil
	}
	d := n.DirtyBitmap("b")
	if d.Busy() {
		return errors.New("the backup's bitmap is still busy")
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
		lost, err := e.lost()
		if err != nil {
			return err
		}
		for off, n, ok := lost.NextDirty(0, lost.Size()); ok; off, n, ok = lost.NextDirty(off, lost.Size()) {
			for end := off + n; off < end; off += 512 {
				if e.bitmap.Get(off) || w.Sync != types.MirrorSyncModeBitmap {
					least.Set(off, 512)
				}
			}
		}
	}
	return within("the backup's bitmap", least, d.Bits(), most)
}

// lost is what a power failure takes from the target: what it does not hold then as the source held
// it at the beginning.
func (e *ended) lost() (*bitmap.Bitmap, error) {
	w := e.w
	v := newWorld(w.ctx, w.Sample, "")
	for name, c := range w.medium {
		v.x.Store.Put(name, c.Durable())
	}
	lost := bitmap.New(blk.AlignUp(w.Layers[0].Size, 512), 512)
	err := v.x.Nodes.Add(v.ctx, v.options("t", w.Target, nil))
	var got []byte
	if err == nil {
		got, err = v.read("t")
	}
	if e := v.x.Close(); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("the target after a power failure: %w", err)
	}
	for i := range e.start {
		if got[i] != e.start[i] {
			lost.Set(w.space.disk(int64(i)), 1)
		}
	}
	return lost, nil
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
func (e *ended) untouched() error {
	w := e.w
	_, may := e.spans(max(512, int64(w.Layers[0].Cluster))) // whose clusters it then has as a whole
	may.Merge(e.allocated)
	most := bitmap.New(may.Size(), e.unit())
	most.Merge(may)
	root, err := w.attach("t", true)
	if err != nil {
		return err
	}
	err = w.unit(root, func(r *blk.Req) error {
		for off, size := int64(0), root.Size(); off < size; {
			x, err := root.Edge().Status(r, off, size-off)
			if err != nil || x.N == 0 {
				return err
			}
			if at, ok := most.NextClean(off, off+x.N); x.Allocated && ok {
				return fmt.Errorf("the target holds byte %d, which the source has from below", at)
			}
			off += x.N
		}
		return nil
	})
	return errors.Join(err, w.x.Graph.CloseRoot(w.ctx, root))
}

func (e *ended) backup(done bool) error {
	w := e.w
	got, err := w.read("t")
	if err != nil {
		return err
	}
	switch {
	case w.Sync == types.MirrorSyncModeNone:
		// What guests changed is there as it was.
		return e.touched(got, e.start)
	case !done:
		return nil
	case w.Sync == types.MirrorSyncModeBitmap, w.Sync == types.MirrorSyncModeIncremental:
		if err := e.equal(got, e.bitmap); err != nil {
			return err
		}
		// The rest is what it was.
		whole := bitmap.New(blk.AlignUp(w.Layers[0].Size, 512), e.unit())
		whole.Merge(e.bitmap)
		for i := range got {
			if !whole.Get(w.space.disk(int64(i))) && got[i] != w.target[i] {
				return fmt.Errorf("byte %d of the target was not to be copied", i)
			}
		}
		return nil
	}
	if err := same("the target", got[:len(e.start)], e.start); err != nil {
		return err
	}
	if w.Sync == types.MirrorSyncModeTop {
		return e.untouched()
	}
	return nil
}

// equal compares what a bitmap says with what was there at the beginning.
func (e *ended) equal(got []byte, b *bitmap.Bitmap) error {
	for at, n, ok := b.NextDirty(0, b.Size()); ok; at, n, ok = b.NextDirty(at+n, b.Size()) {
		for _, s := range e.w.space.of(at, n) {
			n := min(s.n, int64(len(e.start))-s.off)
			if err := same(fmt.Sprintf("the target at %d", e.w.space.disk(s.off)), got[s.off:s.off+n], e.start[s.off:s.off+n]); err != nil {
				return err
			}
		}
	}
	return nil
}

// touched compares what guests changed for certain.
func (e *ended) touched(got, want []byte) error {
	for _, g := range e.guests {
		for _, s := range g.must {
			if err := same(fmt.Sprintf("the target at %d", s.off), got[s.off:s.off+s.n], want[s.off:s.off+s.n]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (e *ended) mirror() error {
	w := e.w
	if w.Sync == types.MirrorSyncModeNone {
		got, err := w.read("t")
		if err != nil {
			return err
		}
		return e.touched(got, w.data)
	}
	if w.Under == "header" {
		w.reopen = "t" // what it has not itself it shows when its backing file is opened
	} else if err := w.shows("t", w.data); err != nil {
		return err
	}
	if w.Sync == types.MirrorSyncModeTop {
		return e.untouched()
	}
	return nil
}

func (e *ended) stream() error {
	w := e.w
	b := w.x.Graph.Node("l0").Backing()
	switch {
	case w.To == len(w.Layers) && b != nil:
		return errors.New("there is still something below")
	case w.To < len(w.Layers) && (b == nil || b.Node().Name() != fmt.Sprintf("l%d", w.To)):
		return errors.New("something else lies below than what was to stay")
	}
	return e.below(w.To)
}

// below compares layers that the job had nothing to do with.
func (e *ended) below(i int) error {
	for ; i < len(e.w.Layers); i++ {
		if err := e.w.shows(fmt.Sprintf("l%d", i), e.w.layers[i]); err != nil {
			return err
		}
	}
	return nil
}

func (e *ended) commit() error {
	w := e.w
	base := fmt.Sprintf("l%d", w.To)
	if err := e.below(w.To + 1); err != nil {
		return err
	}
	want := w.data
	if w.Kind == "commit" {
		want = w.layers[w.From]
	} else if e.top(true) == "l0" {
		want = w.data // left alone, and equal at the end
	}
	got, err := w.read(base)
	if err != nil {
		return err
	}
	if len(got) < len(want) {
		return fmt.Errorf("the base has %d bytes instead of %d", len(got), len(want))
	}
	return same("the base", got[:len(want)], want)
}

// finish closes everything, checks the images, and opens what guests used last by its header alone.
func (w *world) finish() error {
	for i := range 20 {
		left := false
		for _, n := range w.x.Graph.Topology().Nodes {
			if n.MonitorOwned() {
				left = true
				if err := w.x.Nodes.Del(w.ctx, n.Name()); err != nil && i == 19 {
					return err
				}
			}
		}
		if !left {
			break
		}
	}
	if err := w.x.Left(); err != nil {
		return err
	}
	if err := w.sound(w.struck || w.Kill > 0); err != nil || w.reopen == "" {
		return err
	}
	l := w.Target
	if w.reopen[0] == 'l' {
		l = w.Layers[w.reopen[1]-'0']
	}
	if err := w.x.Nodes.Add(w.ctx, w.options(w.reopen, l, nil)); err != nil {
		return err
	}
	return errors.Join(w.shows(w.reopen, w.data), w.x.Nodes.Del(w.ctx, w.reopen))
}
