package qcow2

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// loadBitmaps reads the persistent bitmaps. A broken directory is reported and counts as none: the
// guest's data do not depend on it. A broken bitmap counts as one that has missed writes. What the
// bitmaps take in memory is bounded by what the file has of them: none of it is loaded twice.
// +checklocks:s.mu
func (s *bitmaps) loadBitmaps(r *blk.Req) error {
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
	l := bitmapLoader{r: r, ones: maxOnes, room: maxDirectories,
		none: map[int64]*bitmap.Bitmap{}, data: map[int64]struct{}{}, marks: map[uint64]struct{}{}}
	for _, at := range s.ext.Marks {
		l.marks[at] = struct{}{}
	}
	s.findOverlaps(&l, list)
	all := make([]persisted, 0, len(list))
	for _, m := range list {
		p, err := s.loadBitmap(&l, m)
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

// bitmapLoader is what loading the bitmaps of an image takes.
type bitmapLoader struct {
	r      *blk.Req
	ones   int64                    // what is left of maxOnes
	room   int64                    // what is left of maxDirectories
	none   map[int64]*bitmap.Bitmap // by granularity: all that is ever read of inconsistent bitmaps
	marks  map[uint64]struct{}      // tables of bitmaps that hold although they are in use
	tables []*stored                // those that make sense, by their places; no two share a byte
	data   map[int64]struct{}       // clusters of data that were loaded
}

// findOverlaps marks as broken the bitmaps whose entry makes no sense, or whose table lies over
// that of another or over other metadata.
// +checklocks:s.mu
func (s *imageFile) findOverlaps(l *bitmapLoader, list []*stored) {
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

// overOthers tells whether a cluster of data lies where something else does, and takes it.
// +checklocks:s.mu
func (s *imageFile) overOthers(l *bitmapLoader, off int64) bool {
	if _, ok := l.data[off>>s.cb]; ok || off >= s.file.Size() || s.overlaps(off, s.cs, olAll) != 0 {
		return true
	}
	i, found := slices.BinarySearchFunc(l.tables, off, func(m *stored, off int64) int {
		return cmp.Compare(int64(m.TableOffset), off)
	})
	if found || i > 0 && int64(l.tables[i-1].TableOffset)+l.tables[i-1].TableBytes() > off {
		return true
	}
	l.data[off>>s.cb] = struct{}{}
	return false
}

// loadBitmap reads a bitmap; one that is broken is inconsistent.
// +checklocks:s.mu
func (s *bitmaps) loadBitmap(l *bitmapLoader, m *stored) (persisted, error) {
	_, marked := l.marks[m.TableOffset]
	holds := m.Flags&layout.BitmapInUse == 0 || marked
	p := persisted{name: m.Name, enabled: m.Flags&layout.BitmapAuto != 0, inconsistent: !holds}
	fits := !m.broken && s.bitmapBytes(m.Granularity) <= maxBitmapBytes &&
		int64(m.TableSize) == s.bitmapClusters(m.Granularity)
	if !fits && holds {
		s.warnf("Bitmap '%s' does not fit the image; it counts as inconsistent", m.Name)
		p.inconsistent = true
	}
	if !p.inconsistent {
		bits, err := s.readBitmap(l, m)
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

// readBitmap reads the data of a bitmap; nil if they make no sense.
// +checklocks:s.mu
func (s *bitmaps) readBitmap(l *bitmapLoader, m *stored) (*bitmap.Bitmap, error) {
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
	for i, e := table.next(0); e != 0; i, e = table.next(i + 1) {
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
		case s.overOthers(l, off):
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
