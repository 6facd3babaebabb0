package qcow2

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Persistent bitmaps. While an image is open for writing, its bitmaps are in memory, as dirty
// bitmaps of the node, and the image says so of each (in use): a program that finds that knows that
// they have missed writes. For us those that are live hold all the same (marks.go). All are stored
// when the image is closed or becomes read-only. A new directory always goes this way:
//
//	data and tables -> directory -> refcounts -> | header -> | old data, tables, directory are freed
//
// Until the header refers to the new directory, others find the old one with its flags.

const (
	maxBitmapCount = 65535
	// maxBitmapBytes is what one bitmap may take in the image.
	maxBitmapBytes = 512 << 20
	// maxOnes is what bitmaps that are said to be all ones may take in memory, and maxDirectories
	// what all of an image may take with nothing in them.
	maxOnes        = 64 << 20
	maxDirectories = 32 << 20
)

// bitmaps are the persistent bitmaps. Their methods need marking and mu, exported ones take them.
type bitmaps struct {
	snapshots

	// marking is held while marks are written, and while what they are written to changes; taken
	// before mu.
	marking sync.Mutex
	marks   atomic.Pointer[marks] // nil: no bitmap is marked
	toMark  markQueue

	// stored changes with marking held, too: markNow reads it with that alone.
	stored []*stored // +checklocks:mu
	// badBitmaps: the bitmaps extension makes no sense, and goes with the first change.
	badBitmaps bool // +checklocks:mu
	// dirUnsure: a change of the header has failed, and which directory it refers to is not known.
	dirUnsure bool // +checklocks:mu
	// storing: bitmaps were about to be stored: the image may say that they hold.
	storing      bool // +checklocks:mu
	shownBitmaps atomic.Pointer[[]*types.Qcow2BitmapInfo]
}

// stored is a bitmap as the image has it.
type stored struct {
	layout.BitmapEntry
	table  []uint64 // of a live one; those of others are in the file only
	live   bool     // it has all its clusters, and marks are written to them
	born   bool     // it was added while the image was open
	broken bool     // its entry makes no sense: what it refers to is not ours to free
}

// persisted is a persistent bitmap as the node has it.
type persisted struct {
	name         string
	bits         *bitmap.Bitmap
	enabled      bool
	inconsistent bool
}

// bitmapKeeper has the bitmaps in memory.
type bitmapKeeper interface {
	// loaded takes over the bitmaps of the image, the oldest first.
	loaded(l []persisted, readOnly bool) error
	// forget lets go of one of them: the image has it.
	forget(name string)
	// readOnly tells that the bitmaps must not, or may, change.
	readOnly(ro bool)
	// persisted are those to be stored, newest first.
	persisted() []persisted
	// find returns one of them, or nil.
	find(name string) *persisted
	// names calls f for the name of each of them.
	names(f func(name string))
	// records tells whether writes are recorded in a bitmap.
	records(name string) bool
}

// bitmapSize is the size that bitmaps cover.
func (s *bitmaps) bitmapSize() int64 { return blk.AlignUp(s.size.Load(), blk.SectorSize) }

// bitmapBytes is the length of a bitmap in the image.
func (s *bitmaps) bitmapBytes(granularity int64) int64 {
	return bitmapBytes(s.bitmapSize(), granularity)
}

func bitmapBytes(size, granularity int64) int64 { return ((size+granularity-1)/granularity + 7) / 8 }

// bitmapsFit fails if bitmaps would be too long to be stored with a disk of size bytes: others open
// no image that has such a one.
func (s *bitmaps) bitmapsFit(size int64) error {
	if s.keeper == nil {
		return nil
	}
	for _, p := range s.keeper.persisted() {
		if !p.inconsistent && bitmapBytes(size, p.bits.Granularity()) > maxBitmapBytes {
			return fmt.Errorf("Bitmap '%s' does not fit: %w", p.name, errBitmapTooLong)
		}
	}
	return nil
}

var errBitmapTooLong = errors.New("Too much space will be occupied by the bitmap. Use larger granularity")

// bitmapClusters is the number of entries in the table of a bitmap: one at least, as others
// require.
func (s *bitmaps) bitmapClusters(granularity int64) int64 {
	return max(blk.AlignUp(s.bitmapBytes(granularity), s.cs)/s.cs, 1)
}

// publishBitmaps makes the stored bitmaps known to queries.
// +checklocks:s.mu
func (s *bitmaps) publishBitmaps() {
	var l []*types.Qcow2BitmapInfo
	for _, m := range s.stored {
		if m.born {
			continue // QEMU stores it at the end
		}
		x := &types.Qcow2BitmapInfo{Name: m.Name, Granularity: uint32(m.Granularity)}
		x.Flags = []types.Qcow2BitmapInfoFlags{}
		if m.Flags&layout.BitmapInUse != 0 {
			x.Flags = append(x.Flags, types.Qcow2BitmapInfoFlagsInUse)
		}
		if m.Flags&layout.BitmapAuto != 0 {
			x.Flags = append(x.Flags, types.Qcow2BitmapInfoFlagsAuto)
		}
		l = append(l, x)
	}
	s.shownBitmaps.Store(&l)
	s.tellChanged()
}

// claimBitmaps says in the image that its bitmaps are in use, before anything else is written to
// it, and makes those live that can be.
// +checklocks:s.mu
func (s *bitmaps) claimBitmaps(r *blk.Req) error {
	if s.keeper == nil {
		return s.claimInPlace(r)
	}
	s.keeper.readOnly(false)
	if len(s.stored) == 0 {
		return s.distrust(r)
	}
	err := s.claimLive(r)
	if s.giveOut(r, err) {
		err = s.claimLive(r)
	}
	if err == nil {
		return nil
	}
	s.warnf("Persistent bitmaps will count as inconsistent if they are not stored in the end: %s", blk.ErrnoText(err))
	return s.claimInPlace(r)
}

// claimInPlace changes the flags where they are, unless something else may lie there, so that it
// takes no space. If power fails half-way, nothing else was written before.
// +checklocks:s.mu
func (s *bitmaps) claimInPlace(r *blk.Req) error {
	if err := s.distrust(r); err != nil {
		return err
	}
	fresh := false
	for _, m := range s.stored {
		fresh = fresh || m.Flags&layout.BitmapInUse == 0
		m.Flags |= layout.BitmapInUse
	}
	if !fresh {
		return nil
	}
	err := s.rewriteDirectory(r)
	s.publishBitmaps()
	return err
}

// storeBitmaps writes the bitmaps of the node into the image. The caller flushes afterwards. After
// an error the image says what it said before.
// +checklocks:s.mu
func (s *bitmaps) storeBitmaps(r *blk.Req) error {
	if s.keeper == nil {
		return nil
	}
	want := s.keeper.persisted()
	if len(want) > 0 && s.bitmapSize() == 0 {
		s.warnf("Persistent bitmaps are not kept: there is no format for those of an empty disk")
		want = nil
	}
	if len(want) == 0 && len(s.stored) == 0 {
		return nil
	}
	type pair struct {
		now  *persisted
		from *stored // nil: it is new
	}
	var inOrder []pair
	var list, old []*stored
	placed, named, bornAs := map[string]bool{}, byName(want), map[string]*stored{}
	for _, m := range s.stored {
		switch p := named[m.Name]; {
		case p == nil:
			old = append(old, m)
		case m.born:
			bornAs[m.Name] = m // as in QEMU they come last, the newest first
		default:
			inOrder = append(inOrder, pair{p, m})
			placed[m.Name] = true
		}
	}
	for i := range want {
		if p := &want[i]; !placed[p.name] {
			inOrder = append(inOrder, pair{p, bornAs[p.name]})
		}
	}
	defer s.giveBack(r)
	for _, x := range inOrder {
		if x.now.inconsistent && x.from != nil {
			list = append(list, x.from) // as it is
			continue
		}
		m, err := s.writeBitmap(r, *x.now)
		if err != nil {
			return err
		}
		list = append(list, m)
		if x.from != nil {
			old = append(old, x.from)
		}
	}
	s.storing = true
	if err := s.switchDirectory(r, list, old); err != nil {
		return err
	}
	s.marks.Store(nil)
	return nil
}

// tellLost reports persistent bitmaps that were added while the image was read-only, which it ends:
// they are nowhere in it.
// +checklocks:s.mu
func (s *bitmaps) tellLost() {
	if s.keeper == nil {
		return
	}
	have := make(map[string]bool, len(s.stored))
	for _, m := range s.stored {
		have[m.Name] = true
	}
	lost, oldest := 0, ""
	s.keeper.names(func(name string) {
		if !have[name] {
			lost, oldest = lost+1, name // they come newest first
		}
	})
	if lost > 0 {
		s.warnf("Persistent bitmaps are lost, as the image is read-only: %d, the oldest of which is '%s'", lost, oldest)
	}
}

// byName finds bitmaps by their names.
func byName(l []persisted) map[string]*persisted {
	m := make(map[string]*persisted, len(l))
	for i := range l {
		m[l[i].name] = &l[i]
	}
	return m
}

// writeBitmap writes data and table of a bitmap to new clusters.
// +checklocks:s.mu
func (s *bitmaps) writeBitmap(r *blk.Req, p persisted) (*stored, error) {
	m := &stored{BitmapEntry: layout.NewBitmap(p.name, p.bits.Granularity(), 0)}
	if p.enabled {
		m.Flags |= layout.BitmapAuto
	}
	m.TableSize = uint32(s.bitmapClusters(m.Granularity))
	var table entries
	buf := make([]byte, 0, s.cs)
	per := s.cs * 8 * m.Granularity // bytes of the disk that a cluster of bits stands for
	for lo := int64(0); lo < p.bits.Size(); {
		at, _, dirty := p.bits.NextDirty(lo, p.bits.Size())
		if !dirty {
			break
		}
		i := at / per
		buf = p.bits.AppendBytes(buf[:0], i*s.cs*8, s.cs)
		off, err := s.writeNew(r, buf, "bitmap data")
		if err != nil {
			return nil, err
		}
		table.set(i, uint64(off))
		if lo = (i + 1) * per; lo <= 0 {
			break // beyond all sizes
		}
	}
	return m, s.writeTable(r, m, table.at)
}

// writeTable writes the table of a bitmap to new clusters.
// +checklocks:s.mu
func (s *allocator) writeTable(r *blk.Req, m *stored, at func(i int64) uint64) error {
	tab := make([]byte, m.TableBytes())
	for i := range int64(m.TableSize) {
		be.PutUint64(tab[i*8:], at(i))
	}
	off, err := s.writeNew(r, tab, "bitmap table")
	m.TableOffset = uint64(off)
	return err
}

// freeBitmap frees what a bitmap takes to which the image does not refer any more.
// +checklocks:s.mu
func (s *bitmaps) freeBitmap(r *blk.Req, m *stored) {
	if m.broken {
		return
	}
	table, err := s.readTable(patient(r), int64(m.TableOffset), int64(m.TableSize))
	if err != nil {
		s.warnf("Leaking the clusters of bitmap '%s': %s", m.Name, blk.ErrnoText(err))
	}
	for i, e := table.next(0); e != 0; i, e = table.next(i + 1) {
		// Metadata are not a bitmap's, whatever it says.
		if off := int64(e & layout.OffsetMask); off != 0 && off&(s.cs-1) == 0 && s.overlaps(off, s.cs, olAll) == 0 {
			s.free(off, s.cs, discardOther)
		}
	}
	s.free(int64(m.TableOffset), m.TableBytes(), discardOther)
}

// CanStoreBitmap implements graph.BitmapStore.
func (s *bitmaps) CanStoreBitmap(name string, granularity int64, others int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := layout.NewBitmap(name, granularity, 0)
	dir, names := e.Size(), len(name)
	if s.keeper != nil && s.version >= 3 {
		s.keeper.names(func(name string) {
			e := layout.NewBitmap(name, granularity, 0)
			dir += e.Size()
			names += len(name)
		})
	}
	switch n := s.bitmapBytes(granularity); {
	case s.version < 3:
		return fmt.Errorf("Cannot store dirty bitmaps in qcow2 v2 files")
	case others >= maxBitmapCount:
		return fmt.Errorf("Maximum number of persistent bitmaps is already reached")
	case dir > layout.MaxBitmapDirectory || names > layout.MaxNames:
		return fmt.Errorf("Not enough space in the bitmap directory")
	case n > maxBitmapBytes:
		return errBitmapTooLong
	}
	return nil
}

// RemoveBitmap implements graph.BitmapStore.
func (s *bitmaps) RemoveBitmap(r *blk.Req, name string) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.removeBitmap(r, name)
	if s.giveOut(r, err) {
		err = s.removeBitmap(r, name)
	}
	return err
}

// +checklocks:s.mu
func (s *bitmaps) removeBitmap(r *blk.Req, name string) error {
	i := slices.IndexFunc(s.stored, func(m *stored) bool { return m.Name == name })
	if i < 0 || s.readOnly {
		return s.usable()
	}
	defer s.claimFlush()()
	defer s.giveBack(r)
	gone := s.stored[i]
	return s.switchDirectory(r, slices.Delete(slices.Clone(s.stored), i, i+1), []*stored{gone})
}

// countBitmaps counts directory, tables and data of bitmaps. Nothing of broken ones is ever
// touched.
// +checklocks:s.mu
func (s *bitmaps) countBitmaps(c *counter) error {
	b := s.ext.Bitmaps
	if b == nil {
		return nil
	}
	if ok, err := c.fixed(int64(b.DirectoryOffset), int64(b.DirectorySize), "bitmap directory"); !ok {
		return err
	}
	for _, m := range s.stored {
		if m.broken {
			c.res.fault("broken bitmap with its table at", m.TableOffset)
			c.badBitmaps[m] = true
			continue
		}
		if err := s.countBitmap(c, m); err != nil {
			return err
		}
	}
	return nil
}

// countBitmap counts the table of a bitmap and its data.
// +checklocks:s.mu
func (s *bitmaps) countBitmap(c *counter, m *stored) error {
	ok, err := c.fixed(int64(m.TableOffset), m.TableBytes(), "bitmap table")
	if !ok {
		c.badBitmaps[m] = true
		return err
	}
	table, err := s.readTable(c.r, int64(m.TableOffset), int64(m.TableSize))
	for i, e := table.next(0); err == nil && e != 0; i, e = table.next(i + 1) {
		o := int64(e & layout.OffsetMask)
		switch {
		case o == 0:
			continue
		case o&(s.cs-1) != 0 || s.overlaps(o, s.cs, olAll) != 0:
			c.res.fault("bitmap data where they cannot be:", e)
			c.badBitmaps[m] = true
			continue
		case !c.ref(o, s.cs, 1, true, "bitmap data"):
			c.badBitmaps[m] = true
		}
		if c.crowded() {
			err = errTooBig
		}
	}
	return err
}
