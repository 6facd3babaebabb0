package graph

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// dirtySet are the dirty bitmaps of a node. Writes look at recording only, which is nil for most
// nodes.
type dirtySet struct {
	recording atomic.Pointer[bitmap.Group] // what writes set: the bitmaps that record; nil if there are none
	count     atomic.Int32                 // len(all)

	mu sync.Mutex
	// newest first
	all []*DirtyBitmap // +checklocks:mu
	// as the recorder knows them
	told bitmapStates // +checklocks:mu
}

// DirtyBitmap records which parts of a node were written while it is enabled. Its methods may be
// called from any goroutine.
//
//	enabled <--> disabled
//	   | Freeze                    writes go to a successor; the bitmap holds still and is busy
//	   v
//	frozen --Abdicate--> enabled   with what the successor has recorded
//	       --Reclaim---> enabled   with both
type DirtyBitmap struct {
	n    *Node
	name string
	bits *bitmap.Bitmap

	// Guarded by n.io.dirty.mu.
	disabled, busy, persistent, inconsistent, readOnly bool
	pending                                            BitmapPending    // see SetPending
	successor                                          *DirtyBitmap     // on the list too, without a name
	since                                              []*bitmap.Bitmap // record what is written while a Merge may be undone
}

// BitmapPending is what a transaction under way is about to do with a bitmap.
type BitmapPending uint8

const (
	PendingNone BitmapPending = iota
	PendingRemove
	PendingDisable
)

// DirtyBitmapSpec describes a new bitmap.
type DirtyBitmapSpec struct {
	Name        string // "": a job's own; it is listed, but cannot be found
	Granularity int64  // bytes; 0: DefaultGranularity
	Disabled    bool
	// Persistent: the driver stores it in the image. Inconsistent: it was not stored when it should
	// have been.
	Persistent, Inconsistent bool
	// ReadOnly: it must not change, as the image cannot be written to.
	ReadOnly bool
	// Bits is what it shows, instead of an empty bitmap of the node's size: for nodes that have no
	// size yet.
	Bits *bitmap.Bitmap
}

// Limits of bitmaps, as in QEMU.
const (
	MinGranularity    = 512
	maxBitmapName     = 1023
	coarsestByDefault = 64 << 10
	finestByDefault   = 4 << 10
)

// maxRecorded is what the bitmaps of a node that record may take together, in bytes: one of 512 TiB
// at 64 KiB, or of 4 TiB at 512 bytes, with something set everywhere. Each has an equal share. When
// one has come to that, writes to further parts of the disk set 4096 granules or more at once.
const maxRecorded = 1 << 30

// DefaultGranularity is the image's cluster size, held between 4 and 64 KiB; 64 KiB where there is
// none. In bytes.
func (n *Node) DefaultGranularity() int64 {
	c := n.Caps().Limits.ClusterSize
	if c == 0 {
		return coarsestByDefault
	}
	return min(max(c, finestByDefault), coarsestByDefault)
}

// NewDirtyBitmap makes an empty bitmap on n. Errors: the name is taken or too long.
func (n *Node) NewDirtyBitmap(s DirtyBitmapSpec) (*DirtyBitmap, error) {
	l, err := n.NewDirtyBitmaps([]DirtyBitmapSpec{s})
	if err != nil {
		return nil, err
	}
	return l[0], nil
}

// NewDirtyBitmaps makes several at once, the last of which is the newest; all or none. What it
// costs is linear.
func (n *Node) NewDirtyBitmaps(specs []DirtyBitmapSpec) ([]*DirtyBitmap, error) {
	set := &n.io.dirty
	set.mu.Lock()
	defer set.mu.Unlock()
	taken := make(map[string]bool, len(set.all))
	for _, d := range set.all {
		taken[d.name] = true
	}
	l := make([]*DirtyBitmap, len(specs))
	for i, s := range specs {
		if s.Granularity == 0 {
			s.Granularity = n.DefaultGranularity()
		}
		d := &DirtyBitmap{
			n: n, name: s.Name, disabled: s.Disabled, persistent: s.Persistent, inconsistent: s.Inconsistent,
			readOnly: s.ReadOnly,
		}
		if s.Name != "" && taken[s.Name] {
			return nil, fmt.Errorf("Bitmap already exists: %s", s.Name)
		}
		if len(s.Name) > maxBitmapName {
			return nil, fmt.Errorf("Bitmap name too long: %s", s.Name)
		}
		taken[s.Name] = true
		if d.bits = s.Bits; d.bits == nil {
			d.bits = bitmap.New(n.bitmapSize(), s.Granularity)
		}
		l[i] = d
	}
	all := make([]*DirtyBitmap, 0, len(l)+len(set.all))
	for _, d := range slices.Backward(l) {
		all = append(all, d)
	}
	set.all = append(all, set.all...)
	set.changedLocked()
	return l, nil
}

// bitmapSize is the size that n's bitmaps have: whole sectors.
func (n *Node) bitmapSize() int64 { return blk.AlignUp(n.Size(), blk.SectorSize) }

// DirtyBitmap is the bitmap of that name, or nil.
func (n *Node) DirtyBitmap(name string) *DirtyBitmap {
	n.io.dirty.mu.Lock()
	defer n.io.dirty.mu.Unlock()
	return n.io.dirty.findLocked(name)
}

// FindDirtyBitmap finds a bitmap by its node's name and its own. The errors have QEMU's words.
func (g *Graph) FindDirtyBitmap(node, name string) (*DirtyBitmap, error) {
	return findDirtyBitmap(g.Node(node), node, name)
}

// FindDirtyBitmap is that of the Graph once the Tx is committed, on a node that is Held.
func (tx *Tx) FindDirtyBitmap(node, name string) (*DirtyBitmap, error) {
	return findDirtyBitmap(tx.Held(node), node, name)
}

func findDirtyBitmap(n *Node, node, name string) (*DirtyBitmap, error) {
	if n == nil {
		return nil, fmt.Errorf("Node '%s' not found", node)
	}
	if d := n.DirtyBitmap(name); d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("Dirty bitmap '%s' not found", name)
}

// DirtyBitmaps are all bitmaps, newest first, those of jobs as well.
func (n *Node) DirtyBitmaps() []*DirtyBitmap {
	n.io.dirty.mu.Lock()
	defer n.io.dirty.mu.Unlock()
	return slices.Clone(n.io.dirty.all)
}

// +checklocks:s.mu
func (s *dirtySet) findLocked(name string) *DirtyBitmap {
	for _, d := range s.all {
		if d.name == name && name != "" {
			return d
		}
	}
	return nil
}

// changedLocked makes the list that writes look at anew.
// +checklocks:s.mu
func (s *dirtySet) changedLocked() {
	s.count.Store(int32(len(s.all)))
	var l []*bitmap.Bitmap
	for _, d := range s.all {
		if d.successor == nil && !d.disabled && !d.inconsistent && !d.readOnly {
			l = append(append(l, d.bits), d.since...)
		}
	}
	if l == nil {
		s.recording.Store(nil)
		return
	}
	for _, b := range l {
		b.SetLimit(maxRecorded / int64(len(l)))
	}
	s.recording.Store(bitmap.NewGroup(l))
}

// written records a write of r. It runs while the request is still tracked.
func (s *dirtySet) written(r *blk.Req, off, size int64) {
	if g := s.recording.Load(); g != nil && !g.Has(off, size) {
		g.Set(off, size, r.Unrecorded)
	}
}

// resizeBitmaps gives n's bitmaps the size that n has. What is new is clean.
func (n *Node) resizeBitmaps() {
	s := &n.io.dirty
	if s.count.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	size := n.bitmapSize()
	for _, d := range s.all {
		for _, b := range append(d.since, d.bits) {
			if b.Size() != size {
				b.Resize(size)
			}
		}
	}
}

func (d *DirtyBitmap) set() *dirtySet { return &d.n.io.dirty }

// change changes flags of d.
func (d *DirtyBitmap) change(f func()) {
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.changedLocked()
}

// ask reads flags of d.
func (d *DirtyBitmap) ask(p *bool) bool {
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
	return *p
}

// Name is "" for a job's own bitmap.
func (d *DirtyBitmap) Name() string { return d.name }

// Node is the node that the bitmap belongs to.
func (d *DirtyBitmap) Node() *Node { return d.n }

// Bits is what was recorded. It may be read, and set, at any time.
func (d *DirtyBitmap) Bits() *bitmap.Bitmap { return d.bits }

// Recorded is what the bitmap and, if it is frozen, its successor have recorded. It is Bits or a
// copy, and not to be changed.
func (d *DirtyBitmap) Recorded() *bitmap.Bitmap {
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
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
func (d *DirtyBitmap) Enabled() bool { return !d.ask(&d.disabled) }

// SetBusy keeps others from using the bitmap.
func (d *DirtyBitmap) SetBusy(busy bool) { d.change(func() { d.busy = busy }) }

// Busy tells whether somebody uses the bitmap.
func (d *DirtyBitmap) Busy() bool { return d.ask(&d.busy) }

// SetPending says what is about to become of the bitmap. Nothing does yet; but where it is stored
// before that happens, it is stored as it will be.
func (d *DirtyBitmap) SetPending(p BitmapPending) { d.change(func() { d.pending = p }) }

// Pending is what SetPending said last.
func (d *DirtyBitmap) Pending() BitmapPending {
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.pending
}

// Persistent tells whether the bitmap is to be stored in the image.
func (d *DirtyBitmap) Persistent() bool { return d.ask(&d.persistent) }

// Inconsistent bitmaps have missed writes; they can only be removed.
func (d *DirtyBitmap) Inconsistent() bool { return d.ask(&d.inconsistent) }

// ReadOnly bitmaps must not change.
func (d *DirtyBitmap) ReadOnly() bool { return d.ask(&d.readOnly) }

// SetBitmapsReadOnly changes that of all persistent bitmaps.
func (n *Node) SetBitmapsReadOnly(ro bool) {
	s := &n.io.dirty
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		if d.persistent {
			d.readOnly = ro
		}
	}
	s.changedLocked()
}

// Remove takes the bitmap off its node.
func (d *DirtyBitmap) Remove() {
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(d)
	s.changedLocked()
}

// +checklocks:s.mu
func (s *dirtySet) removeLocked(d *DirtyBitmap) {
	if i := slices.Index(s.all, d); i >= 0 {
		s.all = slices.Delete(s.all, i, i+1)
	}
}

// Freeze makes the bitmap hold still and be busy: writes are recorded in a successor until Abdicate
// or Reclaim.
func (d *DirtyBitmap) Freeze() {
	d.change(func() {
		if d.successor != nil {
			panic("graph: bitmap " + d.name + " is frozen already")
		}
		d.successor = &DirtyBitmap{n: d.n, disabled: d.disabled, bits: bitmap.New(d.bits.Size(), d.bits.Granularity())}
		s := d.set()
		s.all = slices.Insert(s.all, 0, d.successor) // +checklocksignore: change holds s.mu
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
		d.set().removeLocked(d.successor) // +checklocksignore: change holds its mu
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
		since = bitmap.New(d.bits.Size(), d.bits.Granularity())
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
	s := d.set()
	s.mu.Lock() // against a change of the size
	defer s.mu.Unlock()
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
	s := d.set()
	s.mu.Lock()
	defer s.mu.Unlock()
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

// BitmapState is what is shown of a bitmap.
type BitmapState struct {
	Name                                      string
	Count, Granularity                        int64 // bytes
	Recording, Busy, Persistent, Inconsistent bool
}

// BitmapStates are the states of all bitmaps, newest first; nil if there are none.
func (n *Node) BitmapStates() (l []BitmapState) {
	s := &n.io.dirty
	if s.count.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		l = append(l, BitmapState{
			Name: d.name, Count: d.bits.Count(), Granularity: d.bits.Granularity(),
			Recording: !d.disabled, Busy: d.busy, Persistent: d.persistent, Inconsistent: d.inconsistent,
		})
	}
	return l
}
