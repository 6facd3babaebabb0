package graph

import (
	"fmt"
	"slices"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// DirtyBitmap records which parts of a node were written while it is enabled. Its methods may be
// called from any goroutine.
//
//	enabled <--> disabled
//	   | Freeze                    writes go to a successor; the bitmap holds still and is busy
//	   v
//	frozen --Abdicate--> enabled   with what the successor has recorded
//	       --Reclaim---> enabled   with both
type DirtyBitmap struct {
	of   *Bitmaps
	name string
	bits *bitmap.Bitmap

	// Guarded by of.mu.
	disabled, busy, persistent, inconsistent, readOnly bool
	// see SetPending
	pending BitmapPending
	// on the list too, without a name
	successor *DirtyBitmap
	// record what is written while a Merge may be undone
	since []*bitmap.Bitmap
}

// BitmapPending is what a transaction under way is about to do with a bitmap.
type BitmapPending uint8

const (
	PendingNone BitmapPending = iota
	PendingRemove
	PendingDisable
)

// change changes flags of d.
func (d *DirtyBitmap) change(f func()) {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	f()
	d.of.changedLocked()
}

// ask reads a flag of d.
func ask[T any](d *DirtyBitmap, p *T) T {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	return *p
}

// Name is "" for a job's own bitmap.
func (d *DirtyBitmap) Name() string { return d.name }

// Node is the node that the bitmap belongs to.
func (d *DirtyBitmap) Node() *Node { return d.of.n }

// Bits is what was recorded. It may be read, and set, at any time.
func (d *DirtyBitmap) Bits() *bitmap.Bitmap { return d.bits }

// Recorded is what the bitmap and, if it is frozen, its successor have recorded. It is Bits or a
// copy, and not to be changed.
func (d *DirtyBitmap) Recorded() *bitmap.Bitmap {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	if d.successor == nil {
		return d.bits
	}
	b := d.bits.Clone()
	b.Merge(d.successor.bits)
	return b
}

// Enable lets the bitmap record writes.
func (d *DirtyBitmap) Enable() { d.change(func() { d.disabled = false }) }

// Disable ends that.
func (d *DirtyBitmap) Disable() { d.change(func() { d.disabled = true }) }

// Enabled tells whether writes are recorded, in the bitmap or in its successor.
func (d *DirtyBitmap) Enabled() bool { return !ask(d, &d.disabled) }

// SetBusy keeps others from using the bitmap.
func (d *DirtyBitmap) SetBusy(busy bool) { d.change(func() { d.busy = busy }) }

// Busy tells whether somebody uses the bitmap.
func (d *DirtyBitmap) Busy() bool { return ask(d, &d.busy) }

// SetPending says what is about to become of the bitmap. Nothing does yet; but where it is stored
// before that happens, it is stored as it will be.
func (d *DirtyBitmap) SetPending(p BitmapPending) { d.change(func() { d.pending = p }) }

// Pending is what SetPending said last.
func (d *DirtyBitmap) Pending() BitmapPending { return ask(d, &d.pending) }

// Persistent tells whether the bitmap is to be stored in the image.
func (d *DirtyBitmap) Persistent() bool { return ask(d, &d.persistent) }

// Inconsistent bitmaps have missed writes; they can only be removed.
func (d *DirtyBitmap) Inconsistent() bool { return ask(d, &d.inconsistent) }

// ReadOnly bitmaps must not change.
func (d *DirtyBitmap) ReadOnly() bool { return ask(d, &d.readOnly) }

// Remove takes the bitmap off its node.
func (d *DirtyBitmap) Remove() {
	d.change(func() { d.of.removeLocked(d) }) // +checklocksignore: change holds its mu
}

// Freeze makes the bitmap hold still and be busy: writes are recorded in a successor until Abdicate
// or Reclaim.
func (d *DirtyBitmap) Freeze() {
	d.change(func() {
		if d.successor != nil {
			panic("graph: bitmap " + d.name + " is frozen already")
		}
		d.successor = &DirtyBitmap{of: d.of, disabled: d.disabled, bits: d.bits.Like()}
		d.of.all = slices.Insert(d.of.all, 0, d.successor) // +checklocksignore: change holds its mu
		d.busy = true
	})
}

// Abdicate ends Freeze: the bitmap holds what the successor has recorded. The node is drained
// meanwhile.
func (d *DirtyBitmap) Abdicate() { d.thaw(true) }

// Reclaim ends Freeze: the bitmap holds what it held and what the successor has recorded. The node
// is drained meanwhile.
func (d *DirtyBitmap) Reclaim() { d.thaw(false) }

func (d *DirtyBitmap) thaw(forget bool) {
	d.change(func() {
		if d.successor == nil {
			panic("graph: bitmap " + d.name + " is not frozen")
		}
		if forget {
			d.bits.Take()
		}
		d.bits.Merge(d.successor.bits)
		d.of.removeLocked(d.successor) // +checklocksignore: change holds its mu
		d.successor, d.busy = nil, false
	})
}

// Merge adds what b, of the same granularity, holds. undo takes just that back, and keep says that
// it stays; one of the two must follow. What is written in between, by whomever, is recorded a
// second time, so that undo tells it from what was merged. The node is drained when it is called,
// and when undo is: a write that has begun before would be recorded in one of the two only.
func (d *DirtyBitmap) Merge(b *bitmap.Bitmap) (undo, keep func()) {
	var since *bitmap.Bitmap
	d.change(func() {
		since = d.bits.Like()
		since.SetLimit(maxRecorded)
		d.since = append(d.since, since)
	})
	fresh := d.bits.MergeNew(b)
	over := func() {
		d.change(func() {
			i := slices.Index(d.since, since)
			d.since = slices.Delete(slices.Clone(d.since), i, i+1)
		})
	}
	undo = func() {
		d.bits.Subtract(fresh)
		d.bits.Merge(since)
		over()
	}
	return undo, over
}

// Take makes the bitmap clean and returns what it held. What is written at the same time is in one
// of the two.
func (d *DirtyBitmap) Take() *bitmap.Bitmap {
	d.of.mu.Lock() // against a change of the size
	defer d.of.mu.Unlock()
	return d.bits.Take()
}

// BitmapUse is what somebody is about to do with a bitmap.
type BitmapUse uint8

const (
	BitmapChange BitmapUse = iota // change its content
	BitmapRead                    // read it, or whether it records
	BitmapRemove                  // remove it
)

// Check tells why the bitmap cannot be used that way now, in QEMU's words.
func (d *DirtyBitmap) Check(use BitmapUse) error {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	switch {
	case d.busy:
		return fmt.Errorf("Bitmap '%s' is currently in use by another operation and cannot be used", d.name)
	case d.readOnly && use != BitmapRead:
		return fmt.Errorf("Bitmap '%s' is readonly and cannot be modified", d.name)
	case d.inconsistent && use != BitmapRemove:
		return blk.WithHint(fmt.Errorf("Bitmap '%s' is inconsistent and cannot be used", d.name),
			"Try block-dirty-bitmap-remove to delete this bitmap from disk\n")
	}
	return nil
}
