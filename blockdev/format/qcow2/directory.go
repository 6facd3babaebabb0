package qcow2

import (
	"cmp"
	"fmt"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// The directory of persistent bitmaps: how it is read, and how one takes the place of another.

// brokenError is what is wrong with a directory.
type brokenError struct{ error }

func (s *bitmaps) readDirectory(r *blk.Req, off, size int64, n uint32) ([]*stored, error) {
	q := s.sequence(r, off, off+size)
	defer q.close()
	var list []*stored
	names := 0
	for i := range n {
		left := q.end - q.off
		head, err := q.peek(layout.BitmapHeaderSize)
		if err != nil {
			return nil, err
		}
		k, err := layout.BitmapNeed(head, left, i, n)
		if err != nil {
			return nil, &brokenError{err}
		}
		b, err := q.peek(k)
		if err != nil {
			return nil, err
		}
		m := &stored{BitmapEntry: layout.ParseBitmap(b)}
		if names += len(m.Name); names > layout.MaxNames {
			return nil, &brokenError{fmt.Errorf("the names of the bitmaps take more than %d bytes", layout.MaxNames)}
		}
		list = append(list, m)
		q.skip(k)
	}
	if left := q.end - q.off; left != 0 {
		return nil, &brokenError{fmt.Errorf("bitmap directory has %d bytes too many", left)}
	}
	return list, nil
}

// switchDirectory makes the image refer to the bitmaps in list, and frees what those in old, and
// the old directory, take.
// +checklocks:s.mu
func (s *bitmaps) switchDirectory(r *blk.Req, list, old []*stored) error {
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
		var err error
		if now, err = s.sameDirectory(r, list); err == nil && now == nil {
			now, err = s.newDirectory(r, list)
		}
		if err != nil {
			return err
		}
		bits |= layout.AutoclearBitmaps
	}
	if err := s.syncRefcounts(r); err != nil {
		return err
	}
	s.fresh = nil // from here on the image may refer to them, also after an error
	s.ext.Bitmaps, s.ext.Marks, s.hdr.AutoclearFeatures = now, marked, bits
	if err := s.updateHeader(r); err != nil {
		s.ext.Bitmaps, s.ext.Marks, s.hdr.AutoclearFeatures = was, wasMarks, wasBits
		s.dirUnsure = true
		return err
	}
	s.dirUnsure = false
	if s.ext.Marks == nil {
		for _, m := range list {
			m.live = false // there was no room
		}
	}
	s.stored = list
	if was != nil {
		off, end, kept := int64(was.DirectoryOffset), int64(was.DirectoryOffset+was.DirectorySize), int64(0)
		if now != nil && now.DirectoryOffset == was.DirectoryOffset {
			kept = s.geo.RoundUp(int64(now.DirectorySize))
		}
		if off+kept < end {
			s.free(off+kept, end-off-kept, discardOther)
		}
	}
	for _, m := range old {
		s.freeBitmap(r, m)
	}
	s.publishBitmaps()
	return nil
}

// newDirectory writes a directory to new clusters.
// +checklocks:s.mu
func (s *bitmaps) newDirectory(r *blk.Req, list []*stored) (*layout.Bitmaps, error) {
	dir := encodeDirectory(list)
	if len(dir) > layout.MaxBitmapDirectory {
		return nil, errNoSpace
	}
	off, err := s.writeNew(r, dir, "bitmap directory")
	if err != nil {
		return nil, err
	}
	return &layout.Bitmaps{
		NbBitmaps: uint32(len(list)), DirectorySize: uint64(len(dir)), DirectoryOffset: uint64(off),
	}, nil
}

// sameDirectory lets the directory stay where it is if all that list does is to take from its end,
// or to add there what the last cluster has room for: both the old header and the next one refer to
// a whole directory then. So adding one bitmap after the other, and undoing that, does not write
// all names each time. It returns nil if the directory has to move.
// +checklocks:s.mu
func (s *bitmaps) sameDirectory(r *blk.Req, list []*stored) (*layout.Bitmaps, error) {
	was, n := s.ext.Bitmaps, min(len(list), len(s.stored))
	if was == nil || s.dirUnsure || s.badBitmaps || int(was.NbBitmaps) != len(s.stored) {
		return nil, nil
	}
	if len(list) == len(s.stored) || !slices.Equal(list[:n], s.stored[:n]) {
		return nil, nil
	}
	if ok, err := s.ownsDirectory(r); !ok {
		return nil, err
	}
	now := *was
	now.NbBitmaps = uint32(len(list))
	for _, m := range s.stored[n:] {
		now.DirectorySize -= uint64(m.Size())
	}
	more := encodeDirectory(list[n:])
	end := int64(was.DirectorySize) + int64(len(more))
	if len(more) == 0 {
		return &now, nil
	}
	if end > layout.MaxBitmapDirectory || end > s.geo.RoundUp(int64(was.DirectorySize)) {
		return nil, nil
	}
	now.DirectorySize = uint64(end)
	return &now, s.writeMeta(r, more, int64(was.DirectoryOffset+was.DirectorySize), olBitmapDirectory)
}

// ownsDirectory tells whether it is known that nothing else lies in the clusters of the directory,
// so that it can be written where it is.
// +checklocks:s.mu
func (s *bitmaps) ownsDirectory(r *blk.Req) (bool, error) {
	if s.surveying() {
		return false, nil
	}
	b := s.ext.Bitmaps
	end := s.geo.Clusters(int64(b.DirectoryOffset + b.DirectorySize))
	for c := int64(b.DirectoryOffset) >> s.cb; c < end; c++ {
		if n, err := s.refcount(r, c); err != nil || n != 1 || s.wrong.at(c) {
			return false, err
		}
	}
	return true, nil
}

// rewriteDirectory writes the directory after entries of it have changed: where it is or, if
// something else may lie there, anew.
// +checklocks:s.mu
func (s *bitmaps) rewriteDirectory(r *blk.Req) error {
	owns, err := s.ownsDirectory(r)
	if err != nil {
		return err
	}
	if !owns || s.dirUnsure {
		err = s.switchDirectory(r, s.stored, nil)
		if s.giveBack(r); err == nil {
			return nil
		}
		// There may be no space for another. So it has to be known.
		if e := s.vetAll(r); e != nil {
			return e
		}
		if owns, e := s.ownsDirectory(r); !owns {
			return cmp.Or(e, err)
		}
	}
	dir, off := encodeDirectory(s.stored), int64(s.ext.Bitmaps.DirectoryOffset)
	if err := s.writeMeta(r, dir, off, olBitmapDirectory); err != nil {
		return err
	}
	return s.barrier(r)
}

func encodeDirectory(l []*stored) []byte {
	entries := make([]layout.BitmapEntry, len(l))
	for i, m := range l {
		entries[i] = m.BitmapEntry
	}
	return layout.AppendBitmapDirectory(nil, entries)
}

// updateHeader writes header, extensions and backing file name. If they do not all fit, the marks
// go: bitmaps are in use then, as others have them.
// +checklocks:s.mu
func (s *bitmaps) updateHeader(r *blk.Req) error {
	hdr, ext := *s.hdr, *s.ext
	b, err := hdr.Marshal(&ext, s.backName)
	full := err != nil && len(ext.Marks) > 0
	if full {
		ext.Marks = nil
		hdr.AutoclearFeatures &^= layout.AutoclearMarks
		b, err = hdr.Marshal(&ext, s.backName)
	}
	if err != nil {
		return errNoSpace
	}
	used := len(b)
	if used < s.hdrUsed {
		b = append(b, make([]byte, s.hdrUsed-used)...)
	}
	if err := s.enter(r, b, 0); err != nil {
		return err
	}
	// Only what has changed: queries read other fields with no lock.
	s.hdr.HeaderLength, s.hdrUsed = hdr.HeaderLength, used
	s.hdr.BackingFileOffset, s.hdr.BackingFileSize = hdr.BackingFileOffset, hdr.BackingFileSize
	if full {
		s.hdr.AutoclearFeatures = hdr.AutoclearFeatures
		// Not before: until the header says otherwise they hold, and must not miss a write.
		s.forgetMarks()
		s.warnf("The header has no room for the marks: persistent bitmaps will count as inconsistent if they are not stored in the end")
	}
	s.publish()
	return nil
}
