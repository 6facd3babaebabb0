package qcow2

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Persistent bitmaps. While an image is open for writing, its bitmaps are in memory, as the node's dirty bitmaps, and the image says so of each (in use): a
// program that finds that knows that they have missed writes. Those that are live are marked meanwhile, and hold for us (marks.go). All are stored when the
// image is closed or becomes read-only. A new directory always goes this way:
//
//	data and tables -> directory -> refcounts -> | header -> | old data, tables and directory are freed
//
// Before the header refers to the new directory, the old one with its flags is what others find.

// maxBitmapBytes is the most that one bitmap takes in the image. maxOnes is what bitmaps that are said to be all ones may take in memory, maxDirectories what
// all of an image take with nothing in them.
const (
	maxBitmapBytes = 512 << 20
	maxOnes        = 64 << 20
	maxDirectories = 32 << 20
	maxBitmapCount = 65535
)

// stored is a bitmap as the image has it.
type stored struct {
	layout.BitmapEntry
	table  []uint64 // of a live one; those of others are where the file has them
	live   bool     // it has all its clusters, and marks are written to them
	born   bool     // it was added while the image was open
	broken bool     // what its entry says makes no sense: what is there is not ours to free
}

// persisted is a bitmap of the node that is to be in the image.
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
	// readOnly tells that the bitmaps must not, or may, change.
	readOnly(ro bool)
	// persisted are those to be stored, newest first.
	persisted() []persisted
	// find is one of them, or nil.
	find(name string) *persisted
	// names calls f for the name of each of them.
	names(f func(name string))
	// records tells whether writes are recorded in a bitmap.
	records(name string) bool
}

// loadBitmaps reads the persistent bitmaps. A broken directory is reported and counts as none: the guest's data does not depend on it. A broken bitmap counts as
// one that has missed writes. What the bitmaps take in memory is bounded by what the file has of them: nothing of it counts twice.
func (s *image) loadBitmaps(r *blk.Req) error {
	b := s.ext.Bitmaps
	if b == nil {
		return nil
	}
	if size := uint64(s.file.Size()); b.DirectoryOffset > size || b.DirectorySize > size-b.DirectoryOffset {
		s.warnf("Persistent bitmaps are ignored: their directory lies beyond the end of the file")
		s.badBitmaps = true
		return nil
	}
	list, err := s.readDirectory(r, int64(b.DirectoryOffset), int64(b.DirectorySize), b.NbBitmaps)
	var broken *brokenError
	if errors.As(err, &broken) {
		s.warnf("Persistent bitmaps are ignored: %v", broken.error)
		s.badBitmaps = true
		return nil
	}
	if err != nil {
		return wrap("Could not read bitmap directory", err)
	}
	l := bitmapLoader{s: s, r: r, ones: maxOnes, room: maxDirectories, none: map[int64]*bitmap.Bitmap{}, data: map[int64]struct{}{}, marks: map[uint64]struct{}{}}
	for _, at := range s.ext.Marks {
		l.marks[at] = struct{}{}
	}
	l.findOverlaps(list)
	all := make([]persisted, 0, len(list))
	for _, m := range list {
		p, err := l.load(m)
		if err != nil {
			return err
		}
		all = append(all, p)
	}
	s.stored = list
	if s.keeper == nil {
		return nil
	}
	return s.keeper.loaded(all, s.readOnly)
}

// bitmapLoader loads the bitmaps of an image.
type bitmapLoader struct {
	s      *image
	r      *blk.Req
	ones   int64                    // what bitmaps that are said to be all ones may still take
	room   int64                    // what bitmaps may still take with nothing in them
	none   map[int64]*bitmap.Bitmap // by granularity: what inconsistent bitmaps show, of which nobody reads more
	marks  map[uint64]struct{}      // tables of bitmaps that hold although they are in use
	tables []*stored                // those that make sense, by their places; no two share a byte
	data   map[int64]struct{}       // clusters of data that were loaded
}

// findOverlaps marks the bitmaps whose entry makes no sense, or whose table lies over that of another or over other metadata, as broken.
func (l *bitmapLoader) findOverlaps(list []*stored) {
	s := l.s
	for _, m := range list {
		off, n := int64(m.TableOffset), m.TableBytes()
		m.broken = !m.Fits(s.cs) || off+n > s.file.Size() || s.overlaps(off, n, olAll) != 0
		if !m.broken {
			l.tables = append(l.tables, m)
		}
	}
	slices.SortStableFunc(l.tables, func(a, b *stored) int { return cmp.Compare(a.TableOffset, b.TableOffset) })
	end := int64(0)
	for i, m := range l.tables {
		if int64(m.TableOffset) < end {
			m.broken = true
			if i > 0 && !l.tables[i-1].broken {
				l.tables[i-1].broken = true
			}
		}
		end = max(end, s.geo.RoundUp(int64(m.TableOffset)+m.TableBytes()))
	}
	l.tables = slices.DeleteFunc(l.tables, func(m *stored) bool { return m.broken })
}

// taken tells whether a cluster of data lies where something else does, and takes it.
func (l *bitmapLoader) taken(off int64) bool {
	s := l.s
	if _, ok := l.data[off>>s.cb]; ok || off >= s.file.Size() || s.overlaps(off, s.cs, olAll) != 0 {
		return true
	}
	i, found := slices.BinarySearchFunc(l.tables, off, func(m *stored, off int64) int { return cmp.Compare(int64(m.TableOffset), off) })
	if found || i > 0 && int64(l.tables[i-1].TableOffset)+l.tables[i-1].TableBytes() > off {
		return true
	}
	l.data[off>>s.cb] = struct{}{}
	return false
}

// load reads a bitmap; one that is broken is inconsistent.
func (l *bitmapLoader) load(m *stored) (persisted, error) {
	s := l.s
	_, marked := l.marks[m.TableOffset]
	holds := m.Flags&layout.BitmapInUse == 0 || marked
	p := persisted{name: m.Name, enabled: m.Flags&layout.BitmapAuto != 0, inconsistent: !holds}
	fits := !m.broken && s.bitmapBytes(m.Granularity) <= maxBitmapBytes && int64(m.TableSize) == s.bitmapClusters(m.Granularity)
	if !fits && holds {
		s.warnf("Bitmap '%s' does not fit the image; it counts as inconsistent", m.Name)
		p.inconsistent = true
	}
	if !p.inconsistent {
		bits, err := l.read(m)
		if err != nil {
			return p, wrap(fmt.Sprintf("Could not read bitmap '%s'", m.Name), err)
		}
		if p.bits = bits; bits == nil {
			s.warnf("Bitmap '%s' cannot be used; it counts as inconsistent", m.Name)
			p.inconsistent = true
		}
	}
	if p.inconsistent {
		if l.none[m.Granularity] == nil {
			l.none[m.Granularity] = bitmap.New(s.bitmapSize(), m.Granularity)
		}
		p.bits = l.none[m.Granularity]
		m.Flags |= layout.BitmapInUse
	}
	return p, nil
}

// bitmapSize is the size that bitmaps cover.
func (s *image) bitmapSize() int64 { return blk.AlignUp(s.size.Load(), blk.SectorSize) }

// bitmapBytes is the length of a bitmap in the image.
func (s *image) bitmapBytes(granularity int64) int64 {
	return bitmapBytes(s.bitmapSize(), granularity)
}

func bitmapBytes(size, granularity int64) int64 { return ((size+granularity-1)/granularity + 7) / 8 }

// bitmapsFit tells whether a disk of size bytes leaves its bitmaps such that they can be stored. Others open no image with one that is too long.
func (s *image) bitmapsFit(size int64) error {
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

// bitmapClusters is the number of entries in the table of a bitmap: at least one, which others require.
func (s *image) bitmapClusters(granularity int64) int64 {
	return max(blk.AlignUp(s.bitmapBytes(granularity), s.cs)/s.cs, 1)
}

// read reads the data of a bitmap; nil if they make no sense.
func (l *bitmapLoader) read(m *stored) (*bitmap.Bitmap, error) {
	s := l.s
	table, err := s.readTable(l.r, int64(m.TableOffset), int64(m.TableSize))
	if err != nil {
		return nil, err
	}
	b := bitmap.New(s.bitmapSize(), m.Granularity)
	if l.room -= b.Memory(); l.room < 0 {
		return nil, nil
	}
	buf := blk.GetBuf(int(s.cs), 0)
	defer blk.PutBuf(buf)
	for i, e := range table.all() {
		first := i * s.cs * 8
		off := int64(e & layout.OffsetMask)
		switch {
		case e&^(layout.OffsetMask|1) != 0 || off != 0 && e&1 != 0 || off&(s.cs-1) != 0:
			return nil, nil
		case off == 0:
			n := min(s.cs*8, b.Granules()-first)
			if l.ones -= n / 8; l.ones < 0 {
				return nil, nil
			}
			b.Set(first*m.Granularity, n*m.Granularity)
		case l.taken(off):
			return nil, nil
		default:
			if err := ended(l.r); err != nil {
				return nil, err
			}
			if err := s.readFile(l.r, blk.Buf(buf.B), off); err != nil {
				return nil, err
			}
			b.LoadBytes(first, buf.B)
		}
	}
	return b, nil
}

// publishBitmaps makes the stored bitmaps known to queries.
func (s *image) publishBitmaps() {
	var l []*types.Qcow2BitmapInfo
	for _, m := range s.stored {
		if m.born {
			continue // the reference stores it at the end
		}
		x := &types.Qcow2BitmapInfo{Name: m.Name, Granularity: uint32(m.Granularity), Flags: []types.Qcow2BitmapInfoFlags{}}
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

// claimBitmaps says in the image that its bitmaps are in use, before anything else is written to it, and makes those live that can be. marking and mu are
// held.
func (s *image) claimBitmaps(r *blk.Req) error {
	if s.keeper == nil {
		return s.claimInPlace(r)
	}
	s.keeper.readOnly(false)
	if len(s.stored) == 0 {
		return s.distrust(r)
	}
	err := s.orGiveOut(r, func() error { return s.claimLive(r) })
	if err == nil {
		return nil
	}
	s.warnf("Persistent bitmaps will count as inconsistent if they are not stored in the end: %s", blk.ErrnoText(err))
	return s.claimInPlace(r)
}

// claimInPlace changes the flags where they are, unless something else may lie there: it takes no space. Whichever of them are written when power fails, nothing else was written before.
func (s *image) claimInPlace(r *blk.Req) error {
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

// storeBitmaps writes the bitmaps of the node into the image. The caller flushes afterwards. After an error the image says what it said before. marking and mu
// are held.
func (s *image) storeBitmaps(r *blk.Req) error {
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
	var list, old []*stored
	taken, named := map[string]bool{}, byName(want)
	bornAs := map[string]*stored{}
	var err error
	add := func(p persisted, from *stored) {
		if err != nil {
			return
		}
		taken[p.name] = true
		if p.inconsistent && from != nil {
			list = append(list, from) // as it is
			return
		}
		var m *stored
		if m, err = s.writeBitmap(r, p); err == nil {
			list = append(list, m)
			if from != nil {
				old = append(old, from)
			}
		}
	}
	for _, m := range s.stored {
		switch p := named[m.Name]; {
		case p == nil:
			old = append(old, m)
		case m.born:
			bornAs[m.Name] = m // as in the reference they come last, the newest first
		default:
			add(*p, m)
		}
	}
	for _, p := range want {
		if !taken[p.name] {
			add(p, bornAs[p.name])
		}
	}
	if err == nil {
		s.storing = true
		err = s.switchDirectory(r, list, old)
	}
	if err == nil {
		s.marks.Store(nil)
	}
	s.giveBack(r)
	return err
}

// tellLost reports the persistent bitmaps of an image that ends read-only which the image does not have: they were added meanwhile. mu is held.
func (s *image) tellLost() {
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
func (s *image) writeBitmap(r *blk.Req, p persisted) (*stored, error) {
	m := &stored{BitmapEntry: layout.NewBitmap(p.name, p.bits.Granularity(), 0)}
	if p.enabled {
		m.Flags |= layout.BitmapAuto
	}
	m.TableSize = uint32(s.bitmapClusters(m.Granularity))
	var table entries
	buf := make([]byte, 0, s.cs)
	per := s.cs * 8 * m.Granularity // bytes of the disk that a cluster of data is about
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
func (s *image) writeTable(r *blk.Req, m *stored, at func(i int64) uint64) error {
	tab := make([]byte, m.TableBytes())
	for i := range int64(m.TableSize) {
		be.PutUint64(tab[i*8:], at(i))
	}
	off, err := s.writeNew(r, tab, "bitmap table")
	m.TableOffset = uint64(off)
	return err
}

// padding is to what length what is written to new clusters is filled up: a page, so that it is not written piecemeal, and not the cluster. What lies behind
// it in its last cluster means nothing, and may be anything.
const padding = 4 << 10

// freeBitmap gives back what a bitmap takes to which the image does not refer any more.
func (s *image) freeBitmap(r *blk.Req, m *stored) {
	if m.broken {
		return
	}
	table, err := s.readTable(patient(r), int64(m.TableOffset), int64(m.TableSize))
	if err != nil {
		s.warnf("Leaking the clusters of bitmap '%s': %s", m.Name, blk.ErrnoText(err))
	}
	for _, e := range table.all() {
		// Metadata are not a bitmap's, whatever it says.
		if off := int64(e & layout.OffsetMask); off != 0 && off&(s.cs-1) == 0 && s.overlaps(off, s.cs, olAll) == 0 {
			s.free(off, s.cs, discardOther)
		}
	}
	s.free(int64(m.TableOffset), m.TableBytes(), discardOther)
}

// CanStoreBitmap implements graph.BitmapStore.
func (s *image) CanStoreBitmap(name string, granularity int64, others int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := layout.NewBitmap(name, granularity, 0)
	dir, names := e.Size(), len(name)
	if s.keeper != nil && s.hdr.Version >= 3 {
		s.keeper.names(func(name string) {
			e := layout.NewBitmap(name, granularity, 0)
			dir += e.Size()
			names += len(name)
		})
	}
	switch n := s.bitmapBytes(granularity); {
	case s.hdr.Version < 3:
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
func (s *image) RemoveBitmap(r *blk.Req, name string) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.orGiveOut(r, func() error { return s.removeBitmap(r, name) })
}

func (s *image) removeBitmap(r *blk.Req, name string) error {
	i := slices.IndexFunc(s.stored, func(m *stored) bool { return m.Name == name })
	if i < 0 || s.readOnly {
		return s.usable()
	}
	defer s.claimFlush()()
	defer s.giveBack(r)
	gone := s.stored[i]
	return s.switchDirectory(r, slices.Delete(slices.Clone(s.stored), i, i+1), []*stored{gone})
}

// countBitmaps counts directory, tables and data of persistent bitmaps. Broken ones have nothing that would ever be touched.
func (s *image) countBitmaps(c *counter) error {
	b := s.ext.Bitmaps
	if b == nil {
		return nil
	}
	if ok, err := c.fixed(int64(b.DirectoryOffset), int64(b.DirectorySize), "bitmap directory"); !ok {
		return err
	}
	for _, m := range s.stored {
		if m.broken {
			c.res.Corruptions++
			c.res.say("broken bitmap with its table at", m.TableOffset)
			continue
		}
		if err := s.countBitmap(c, m); err != nil {
			return err
		}
	}
	return nil
}

// countBitmap counts the table of a bitmap and its data.
func (s *image) countBitmap(c *counter, m *stored) error {
	ok, err := c.fixed(int64(m.TableOffset), m.TableBytes(), "bitmap table")
	if !ok {
		return err
	}
	return s.eachTableEntry(c.r, int64(m.TableOffset), int64(m.TableSize), func(e uint64) error {
		if o := int64(e & layout.OffsetMask); o != 0 && o&(s.cs-1) == 0 && s.overlaps(o, s.cs, olAll) == 0 {
			if c.ref(o, s.cs, 1, true, "bitmap data"); c.crowded() {
				return errTooBig
			}
		}
		return nil
	})
}
