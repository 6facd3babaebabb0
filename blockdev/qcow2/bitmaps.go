package qcow2

import (
	"fmt"
	"slices"

	"qblockd/blockdev/qcow2/layout"
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

// maxBitmapBytes is the most that one bitmap takes in the image, and maxOnes what bitmaps that are said to be all ones may take in memory.
const (
	maxBitmapBytes = 512 << 20
	maxOnes        = 64 << 20
	maxBitmapCount = 65535
)

// stored is a bitmap as the image has it.
type stored struct {
	layout.BitmapEntry
	table []uint64
	live  bool // it has all its clusters, and marks are written to them
	born  bool // it was added while the image was open
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
	// loaded takes over a bitmap of the image.
	loaded(p persisted, readOnly bool) error
	// readOnly tells that the bitmaps must not, or may, change.
	readOnly(ro bool)
	// persisted are those to be stored, newest first.
	persisted() []persisted
	// records tells whether writes are recorded in a bitmap.
	records(name string) bool
}

// loadBitmaps reads the persistent bitmaps. A broken directory is reported and counts as none: the guest's data does not depend on it. A broken bitmap counts as
// one that has missed writes.
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
	dir := make([]byte, b.DirectorySize)
	if err := s.readFile(r, blk.Buf(dir), int64(b.DirectoryOffset)); err != nil {
		return wrap("Could not read bitmap directory", err)
	}
	entries, err := layout.ParseBitmapDirectory(dir, b.NbBitmaps)
	if err != nil {
		s.warnf("Persistent bitmaps are ignored: %v", err)
		s.badBitmaps = true
		return nil
	}
	ones := int64(maxOnes)
	for _, e := range entries {
		m := &stored{BitmapEntry: e}
		s.stored = append(s.stored, m)
		holds := e.Flags&layout.BitmapInUse == 0 || slices.Contains(s.ext.Marks, e.TableOffset)
		p := persisted{name: e.Name, enabled: e.Flags&layout.BitmapAuto != 0, inconsistent: !holds}
		n := s.bitmapBytes(e.Granularity)
		if want := s.bitmapClusters(e.Granularity); n > maxBitmapBytes || int64(e.TableSize) != want {
			if !p.inconsistent {
				s.warnf("Bitmap '%s' does not fit the image; it counts as inconsistent", e.Name)
			}
			p.inconsistent = true
		}
		if int64(e.TableSize) <= maxBitmapBytes/s.cs {
			if m.table, err = s.readTable(r, int64(e.TableOffset), int64(e.TableSize)); err != nil {
				return wrap("Could not read bitmap table", err)
			}
		}
		if p.inconsistent {
			// Nobody reads it, so it takes no memory.
			p.bits = bitmap.New(s.bitmapSize(), e.Granularity)
		} else if p.bits, err = s.readBitmap(r, m, &ones); err != nil {
			return wrap(fmt.Sprintf("Could not read bitmap '%s'", e.Name), err)
		} else if p.bits == nil {
			s.warnf("Bitmap '%s' cannot be used; it counts as inconsistent", e.Name)
			p.inconsistent, p.bits = true, bitmap.New(s.bitmapSize(), e.Granularity)
		}
		if p.inconsistent {
			m.Flags |= layout.BitmapInUse
		}
		if s.keeper != nil {
			if err := s.keeper.loaded(p, s.readOnly); err != nil {
				return err
			}
		}
	}
	return nil
}

// bitmapSize is the size that bitmaps cover.
func (s *image) bitmapSize() int64 { return blk.AlignUp(s.size.Load(), layout.SectorSize) }

// bitmapBytes is the length of a bitmap in the image.
func (s *image) bitmapBytes(granularity int64) int64 {
	return ((s.bitmapSize()+granularity-1)/granularity + 7) / 8
}

// bitmapClusters is the number of entries in the table of a bitmap: at least one, which others require.
func (s *image) bitmapClusters(granularity int64) int64 {
	return max(blk.AlignUp(s.bitmapBytes(granularity), s.cs)/s.cs, 1)
}

// readBitmap reads the data of a bitmap; nil if they make no sense.
func (s *image) readBitmap(r *blk.Req, m *stored, ones *int64) (*bitmap.Bitmap, error) {
	b := bitmap.New(s.bitmapSize(), m.Granularity)
	buf := blk.GetBuf(int(s.cs), 0)
	defer blk.PutBuf(buf)
	for i, e := range m.table {
		first := int64(i) * s.cs * 8
		off := int64(e & layout.OffsetMask)
		switch {
		case e&^(layout.OffsetMask|1) != 0 || off != 0 && e&1 != 0 || off&(s.cs-1) != 0:
			return nil, nil
		case off == 0 && e == 0:
		case off == 0:
			n := min(s.cs*8, b.Granules()-first)
			if *ones -= n / 8; *ones < 0 {
				return nil, nil
			}
			b.Set(first*m.Granularity, n*m.Granularity)
		default:
			if err := s.readFile(r, blk.Buf(buf.B), off); err != nil {
				return nil, err
			}
			b.LoadBytes(first, buf.B)
		}
	}
	return b, nil
}

// bitmapInfo is what image information shows of the stored bitmaps.
func (s *image) bitmapInfo() []*types.Qcow2BitmapInfo {
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
	return l
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
	err := s.claimLive(r)
	if err == nil {
		return nil
	}
	s.warnf("Persistent bitmaps will count as inconsistent if they are not stored in the end: %s", blk.ErrnoText(err))
	return s.claimInPlace(r)
}

// claimInPlace changes the flags where they are: it takes no space. Whichever of them are written when power fails, nothing else was written before.
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
	dir := s.encodeDirectory(s.stored)
	if err := s.writeMeta(r, dir, int64(s.ext.Bitmaps.DirectoryOffset), olBitmapDirectory); err != nil {
		return err
	}
	s.publish()
	return s.barrier(r)
}

func (s *image) encodeDirectory(l []*stored) []byte {
	entries := make([]layout.BitmapEntry, len(l))
	for i, m := range l {
		entries[i] = m.BitmapEntry
	}
	return layout.AppendBitmapDirectory(nil, entries)
}

// writeAutoclear changes the autoclear feature bits on disk and then in memory.
func (s *image) writeAutoclear(r *blk.Req, v uint64) error {
	var b [8]byte
	be.PutUint64(b[:], v)
	if err := s.writeMeta(r, b[:], layout.OffAutoclearFeatures, olMainHeader); err != nil {
		return err
	}
	if err := s.barrier(r); err != nil {
		return err
	}
	s.hdr.AutoclearFeatures = v
	return nil
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
	taken := map[string]bool{}
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
	var born []*stored // as in the reference they come last, the newest first
	for _, m := range s.stored {
		switch p := find(want, m.Name); {
		case p == nil:
			old = append(old, m)
		case m.born:
			born = append(born, m)
		default:
			add(*p, m)
		}
	}
	for _, p := range want {
		if !taken[p.name] {
			var from *stored
			if i := slices.IndexFunc(born, func(m *stored) bool { return m.Name == p.name }); i >= 0 {
				from = born[i]
			}
			add(p, from)
		}
	}
	if err == nil {
		err = s.switchDirectory(r, list, old)
	}
	if err == nil {
		s.marks.Store(nil)
	}
	s.giveBack(r)
	return err
}

// find is the bitmap of that name, or nil.
func find(l []persisted, name string) *persisted {
	for i := range l {
		if l[i].name == name {
			return &l[i]
		}
	}
	return nil
}

// giveBack frees what was taken for bitmaps that are not in the image after all.
func (s *image) giveBack(r *blk.Req) {
	for _, c := range s.fresh {
		s.unref(r, freed{off: c << s.cb, n: s.cs})
	}
	s.fresh = nil
}

// writeBitmap writes data and table of a bitmap to new clusters.
func (s *image) writeBitmap(r *blk.Req, p persisted) (*stored, error) {
	m := &stored{BitmapEntry: layout.BitmapEntry{Name: p.name, Granularity: p.bits.Granularity()}}
	if p.enabled {
		m.Flags |= layout.BitmapAuto
	}
	m.table = make([]uint64, s.bitmapClusters(m.Granularity))
	m.TableSize = uint32(len(m.table))
	buf := make([]byte, 0, s.cs)
	for i := range m.table {
		first := int64(i) * s.cs * 8
		lo := first * m.Granularity
		if _, _, dirty := p.bits.NextDirty(lo, min(lo+s.cs*8*m.Granularity, p.bits.Size())); !dirty {
			continue
		}
		buf = p.bits.AppendBytes(buf[:0], first, s.cs)
		off, err := s.writeNew(r, buf, "bitmap data")
		if err != nil {
			return nil, err
		}
		m.table[i] = uint64(off)
	}
	return m, s.writeTable(r, m)
}

// writeTable writes the table of a bitmap to new clusters.
func (s *image) writeTable(r *blk.Req, m *stored) error {
	tab := make([]byte, len(m.table)*8)
	for i, e := range m.table {
		be.PutUint64(tab[i*8:], e)
	}
	off, err := s.writeNew(r, tab, "bitmap table")
	m.TableOffset = uint64(off)
	return err
}

// writeNew writes b to new clusters and returns where.
func (s *image) writeNew(r *blk.Req, b []byte, what string) (int64, error) {
	n := blk.AlignUp(int64(len(b)), s.cs) >> s.cb
	first, _, err := s.allocate(r, n, n, what)
	if err != nil {
		return 0, err
	}
	for i := range n {
		s.fresh = append(s.fresh, first+i)
	}
	b = append(b, make([]byte, n<<s.cb-int64(len(b)))...)
	return first << s.cb, s.writeMeta(r, b, first<<s.cb, 0)
}

// switchDirectory makes the image refer to the bitmaps in list, and gives back what those in old, and the old directory, take.
func (s *image) switchDirectory(r *blk.Req, list, old []*stored) error {
	was, wasMarks, wasBits := s.ext.Bitmaps, s.ext.Marks, s.hdr.AutoclearFeatures
	var now *layout.Bitmaps
	var marked []uint64
	bits := wasBits &^ (layout.AutoclearBitmaps | layout.AutoclearMarks)
	for _, m := range list {
		if m.live {
			marked = append(marked, m.TableOffset)
			bits |= layout.AutoclearMarks
		}
	}
	if len(list) > 0 {
		dir := s.encodeDirectory(list)
		if len(dir) > layout.MaxBitmapDirectory {
			return errNoSpace
		}
		off, err := s.writeNew(r, dir, "bitmap directory")
		if err != nil {
			return err
		}
		now = &layout.Bitmaps{NbBitmaps: uint32(len(list)), DirectorySize: uint64(len(dir)), DirectoryOffset: uint64(off)}
		bits |= layout.AutoclearBitmaps
	}
	if err := s.writeRefcounts(r); err != nil {
		return err
	}
	if err := s.barrier(r); err != nil {
		return err
	}
	s.fresh = nil // from here on the image may refer to them, also after an error
	s.ext.Bitmaps, s.ext.Marks, s.hdr.AutoclearFeatures = now, marked, bits
	if err := s.updateHeader(r); err != nil {
		s.ext.Bitmaps, s.ext.Marks, s.hdr.AutoclearFeatures = was, wasMarks, wasBits
		return err
	}
	if s.ext.Marks == nil {
		for _, m := range list {
			m.live = false // there was no room
		}
	}
	s.stored = list
	if was != nil {
		s.free(int64(was.DirectoryOffset), int64(was.DirectorySize), discardOther)
	}
	for _, m := range old {
		s.freeBitmap(m)
	}
	s.publish()
	return nil
}

func (s *image) freeBitmap(m *stored) {
	for _, e := range m.table {
		if off := int64(e & layout.OffsetMask); off != 0 && off&(s.cs-1) == 0 {
			s.free(off, s.cs, discardOther)
		}
	}
	if m.TableSize > 0 {
		s.free(int64(m.TableOffset), int64(m.TableSize)*8, discardOther)
	}
}

// CanStoreBitmap implements graph.BitmapStore.
func (s *image) CanStoreBitmap(name string, granularity int64, others int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries := []layout.BitmapEntry{{Name: name}}
	if s.keeper != nil && s.hdr.Version >= 3 {
		for _, p := range s.keeper.persisted() {
			entries = append(entries, layout.BitmapEntry{Name: p.name})
		}
	}
	switch n := s.bitmapBytes(granularity); {
	case s.hdr.Version < 3:
		return fmt.Errorf("Cannot store dirty bitmaps in qcow2 v2 files")
	case others >= maxBitmapCount:
		return fmt.Errorf("Maximum number of persistent bitmaps is already reached")
	case len(layout.AppendBitmapDirectory(nil, entries)) > layout.MaxBitmapDirectory:
		return fmt.Errorf("Not enough space in the bitmap directory")
	case n > maxBitmapBytes:
		return fmt.Errorf("Too much space will be occupied by the bitmap. Use larger granularity")
	}
	return nil
}

// RemoveBitmap implements graph.BitmapStore.
func (s *image) RemoveBitmap(r *blk.Req, name string) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.stored, func(m *stored) bool { return m.Name == name })
	if i < 0 || s.readOnly {
		return s.usable()
	}
	defer s.claimFlush()()
	defer s.giveBack(r)
	gone := s.stored[i]
	return s.switchDirectory(r, slices.Delete(slices.Clone(s.stored), i, i+1), []*stored{gone})
}
