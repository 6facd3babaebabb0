package copybeforewrite

import (
	"fmt"
	"syscall"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// open opens the filter for blockdev-add. The point in time that it keeps is that of its opening,
// or, if it is put into a disk in use, of that moment (see Idle).
func open(o *driver.Opening, u *types.BlockdevOptionsCbw) (graph.Driver, error) {
	file, target := o.Node.FilteredChild(), o.Node.Child("target")
	if a, b := blk.AlignUp(file.Size(), blk.SectorSize), blk.AlignUp(target.Size(), blk.SectorSize); b < a {
		return nil, fmt.Errorf("Target '%s' of %d bytes is too small for '%s' of %d bytes",
			target.Node().Name(), b, file.Node().Name(), a)
	}
	part, err := bitmapPart(o.Node.Graph(), u.Bitmap, blk.AlignUp(file.Size(), blk.SectorSize))
	if err != nil {
		return nil, err
	}
	cluster, err := ClusterSize(target.Node(), types.Or(u.MinClusterSize, 0))
	if err != nil {
		return nil, err
	}
	d := New(o.Node, file.Size(), cluster, false)
	d.breakSnapshot = types.Or(u.OnCbwError, "") == types.OnCbwErrorBreakSnapshot
	d.timeout = time.Duration(types.Or(u.CbwTimeout, 0)) * time.Second
	d.wholly, d.left = part == nil, file.Node().IO().Generation()
	for _, b := range []*bitmap.Bitmap{d.pending, d.access} {
		if d.wholly {
			b.SetAll()
		} else {
			b.Merge(part)
		}
	}
	d.TrackReaders(file.Node(), target.Node())
	// Clients see on the source what is still to be copied.
	d.listed, err = file.Node().Bitmaps().New(graph.DirtyBitmapSpec{Bits: d.pending, Disabled: true})
	return d, err
}

// bitmapPart is what a bitmap holds that says what the point in time consists of; nil if there is
// none.
func bitmapPart(g *graph.Graph, b *types.BlockDirtyBitmap, size int64) (*bitmap.Bitmap, error) {
	if b == nil {
		return nil, nil
	}
	d, err := g.FindDirtyBitmap(b.Node, b.Name)
	if err != nil {
		return nil, err
	}
	err = d.Check(graph.BitmapRead)
	if have := d.Bits().Size(); err == nil && have != size {
		err = fmt.Errorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", size, have)
	}
	if err != nil {
		return nil, fmt.Errorf("Cannot create block-copy-state: Failed to merge bitmap '%s' to internal copy-bitmap: %w", b.Name, err)
	}
	return d.Recorded(), nil
}

// errBroken is what readers of a spoilt point in time get.
var errBroken = blk.Text("The snapshot is broken: copying before a write has failed", syscall.EACCES)

var errNoAccess = blk.Text("This part is not in the snapshot", syscall.EACCES)

// ReadSnapshot implements graph.SnapshotReader.
func (d *Driver) ReadSnapshot(r *blk.Req, v blk.Vec, off int64) error {
	for done, size := int64(0), v.Len(); done < size; {
		n, err := d.reader(off+done, size-done, func(e *graph.Edge, n int64) error {
			return e.ReadAt(r, v.Slice(done, n), off+done, 0)
		})
		if err != nil {
			return err
		}
		done += n
	}
	return nil
}

// SnapshotStatus implements graph.SnapshotReader.
func (d *Driver) SnapshotStatus(r *blk.Req, off, n int64) (x blk.Extent, err error) {
	_, err = d.reader(off, n, func(e *graph.Edge, n int64) error {
		x, err = e.StatusAbove(r, nil, false, off, n)
		return err
	})
	if x.N == 0 {
		x = blk.Extent{N: n, Zero: true}
	}
	return blk.Extent{N: x.N, Data: x.Data, Zero: x.Zero, Allocated: true}, err
}

// DiscardSnapshot implements graph.SnapshotReader: the whole clusters of the range are given up. Of
// the point in time of a backup nothing is given up, as the job's copy is to be whole.
func (d *Driver) DiscardSnapshot(r *blk.Req, off, n int64) error {
	lo, hi := blk.Inner(off, off+n, d.cluster, d.pending.Size())
	if lo == hi || d.copied != nil {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	d.mu.Lock()
	d.access.Clear(lo, hi-lo)
	d.pending.Clear(lo, hi-lo)
	d.mu.Unlock()
	if end := d.target().Size(); hi > end {
		hi = end
	}
	return d.target().Discard(r, lo, hi-lo)
}

// keptLocked is how much of [off, off+n), none of which is done, is kept from changing: what is to
// be copied or being copied. A backup of less than all leaves the rest to the guests.
// +checklocks:d.mu
func (d *Driver) keptLocked(off, n int64) int64 {
	clean, ok := d.pending.NextClean(off, off+n)
	if !ok {
		return n
	}
	if clean > off {
		return clean - off
	}
	for c := range d.copies {
		if c.off <= off && off < c.off+c.n {
			return min(n, c.off+c.n-off)
		}
	}
	return 0
}

// reader calls f for a prefix of [off, off+n) with the edge that leads to what was there: to the
// target where that was copied, else to the source, which nobody changes there until f returns. It
// waits for nobody.
func (d *Driver) reader(off, n int64, f func(e *graph.Edge, n int64) error) (int64, error) {
	if d.broken.Load() {
		return 0, errBroken
	}
	if clean, ok := d.access.NextClean(off, off+n); ok {
		if clean == off {
			return 0, errNoAccess
		}
		n = clean - off
	}
	d.readers.Add(1)
	defer d.readers.Add(-1)
	d.mu.Lock()
	at, k, ok := d.done.NextDirty(off, off+n)
	if ok && at == off {
		d.mu.Unlock()
		return k, f(d.target(), k)
	}
	if ok {
		n = at - off
	}
	if n = d.keptLocked(off, n); n == 0 {
		d.mu.Unlock()
		return 0, errNoAccess
	}
	c := &running{off: off, n: n, over: make(chan struct{})}
	d.reading[c] = struct{}{}
	d.mu.Unlock()
	defer func() { // also after a panic: guests wait for it
		d.mu.Lock()
		delete(d.reading, c)
		close(c.over)
		d.mu.Unlock()
	}()
	err := f(d.source(), n)
	if d.broken.Load() {
		err = errBroken // a guest may have written in between
	}
	return n, err
}
