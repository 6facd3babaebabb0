package qcow2

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Resize changes the size of the disk. What is added reads as zeroes. No requests may run beyond
// the smaller of both sizes.
func (s *image) Resize(r *blk.Req, size int64, m blk.Prealloc) error {
	switch m {
	case blk.PreallocOff, blk.PreallocMetadata, blk.PreallocFalloc, blk.PreallocFull, "":
	default:
		return fmt.Errorf("Unsupported preallocation mode '%s'", m)
	}
	if size&(blk.SectorSize-1) != 0 {
		return fmt.Errorf("The new size must be a multiple of %d", blk.SectorSize)
	}
	kept := s.keepsBack()
	err := s.resize(r, size, m)
	if err != nil && kept && s.giveSpace(r, err) {
		err = s.resize(r, size, m)
	}
	return err
}

func (s *image) resize(r *blk.Req, size int64, m blk.Prealloc) error {
	s.resizing.Lock()
	defer s.resizing.Unlock()
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.vetAll(r); err != nil {
		return err
	}
	if len(s.snaps) > 0 && s.version < 3 {
		return errors.New("Can't resize a v2 image which has snapshots")
	}
	old := s.size.Load()
	if size > old {
		if err := s.bitmapsFit(size); err != nil {
			return err
		}
	}
	if size < old && m != blk.PreallocOff && m != "" {
		return errors.New("Preallocation can't be used for shrinking an image")
	}
	marked := s.marks.Load() != nil
	if marked {
		if err := s.pauseMarks(r); err != nil {
			return err
		}
	}
	var err error
	if size < old {
		err = s.shrink(r, old, size)
	} else {
		err = s.grow(r, old, size, m)
	}
	if marked {
		s.resumeMarks(r)
	}
	return err
}

// +checklocks:s.mu
func (s *image) grow(r *blk.Req, old, size int64, m blk.Prealloc) error {
	if err := s.growL1(r, int64(s.geo.L1Entries(uint64(size)))); err != nil {
		return wrap("Failed to grow the L1 table", err)
	}
	if err := s.zeroTail(r, old, size); err != nil {
		return wrap("Failed to zero out the new area", err)
	}
	from, to := s.geo.Clusters(old), s.geo.Clusters(size)
	// The state of a machine, or what somebody has left there, must not become part of the disk.
	if err := s.discard(r, from, to, false, true, discardNever); err != nil {
		return wrap("Failed to zero out the new area", err)
	}
	dataEnd := int64(0)
	if s.geo.External {
		dataEnd = s.external.Size()
	}
	if err := s.fillNew(r, old, size, m); err != nil {
		if s.usable() == nil {
			// Others need the space, as the disk does not get it.
			if e := s.release(patient(r), size, old, dataEnd); e != nil {
				s.warnf("What was taken for a larger disk is not given back: %s", blk.ErrnoText(e))
			}
		}
		return err
	}
	return s.setSize(r, size)
}

// fillNew provides for what is added to a disk: space, or zeroes that hide the backing file.
// +checklocks:s.mu
func (s *image) fillNew(r *blk.Req, old, size int64, m blk.Prealloc) error {
	from, to := s.geo.Clusters(old), s.geo.Clusters(size)
	if s.geo.External {
		if err := s.growData(r, old, size, m); err != nil {
			return err
		}
	}
	if s.raw && (m == blk.PreallocOff || m == "") {
		// What the data file shows by itself is also what the tables, which count, make of it.
		m = blk.PreallocMetadata
	}
	switch {
	case m != blk.PreallocOff && m != "" && from < to:
		if err := s.preallocate(r, from, to, m); err != nil {
			return err
		}
		if err := s.flush(r); err != nil {
			return wrap("Failed to flush the preallocated area to disk", err)
		}
	case s.backSize() > old && from < to:
		// The backing file must not show through behind the old end.
		if s.version < 3 {
			return wrap("Failed to zero out new clusters", blk.ErrNotSupported)
		}
		end := min(to, s.geo.Clusters(s.backSize()))
		err := s.zeroClusters(r, &sliceWalk{gc: from, to: end, create: true}, false)
		if err == nil {
			err = s.flush(r)
		}
		if err != nil {
			return wrap("Failed to zero out new clusters", err)
		}
	}
	return nil
}

// zeroTail clears what lies between the old end and the end of its cluster. mu is dropped for
// writing.
// +checklocks:s.mu
func (s *image) zeroTail(r *blk.Req, old, size int64) error {
	end := min(size, s.geo.RoundUp(old))
	if old >= end {
		return nil
	}
	at := old
	for at < end {
		m, err := s.lookup(r, at, end-at)
		if err != nil {
			return err
		}
		if m.kind != layout.ZeroPlain && m.kind != layout.ZeroAlloc && (m.kind != layout.Unallocated || s.backSize() > at) {
			break
		}
		at += m.n
	}
	if at >= end {
		return nil
	}
	var err error
	b := make([]byte, end-old)
	// What is copied around the write ends with the disk, which has to have the new size already.
	s.size.Store(end)
	s.unlocked(func() { err = s.writeAt(r, blk.Buf(b), old, 0) })
	s.size.Store(old)
	s.wrote++
	return err
}

// setSize enters the size into the header. If that fails it has the old one again, unless even that
// cannot be written.
// +checklocks:s.mu
func (s *image) setSize(r *blk.Req, size int64) error {
	err := s.barrier(r)
	if err == nil {
		if err = s.enter64(r, uint64(size), layout.OffSize); err != nil {
			err = errors.Join(err, s.enter64(r, s.hdr.Size, layout.OffSize))
		}
	}
	if err != nil {
		return wrap("Failed to update the image size", err)
	}
	s.hdr.Size = uint64(size)
	s.size.Store(size)
	// A larger disk may need a larger cache. The slice size stays.
	if set, err := resolve(&s.options, s.hdr, s.unmap); err == nil {
		tables := set.l2Tables
		if set.slice != s.slice {
			tables = int(int64(set.l2Tables) * set.slice / s.slice)
		}
		s.l2.max = max(s.l2.max, tables)
	}
	return nil
}

// shrink frees everything beyond size and gives the file's tail back.
// +checklocks:s.mu
func (s *image) shrink(r *blk.Req, old, size int64) error {
	if err := s.release(r, old, size, size); err != nil {
		return err
	}
	// Last, so that a failure leaves the size as it was.
	return s.setSize(r, size)
}

// release frees what a disk of old bytes has behind size, and cuts the file behind what is left, a
// data file at dataEnd.
// +checklocks:s.mu
func (s *discarder) release(r *blk.Req, old, size, dataEnd int64) error {
	if err := s.discard(r, s.geo.Clusters(size), s.geo.Clusters(old), false, true, discardAlways); err != nil {
		return wrap("Failed to discard cropped clusters", err)
	}
	keep := int64(s.geo.L1Entries(uint64(size)))
	told := false
	for i, e := s.l1.next(keep); e != 0; i, e = s.l1.next(i + 1) {
		if !told {
			told = true
			s.step(r, blk.EvL1ShrinkWriteTable)
			s.step(r, blk.EvL1ShrinkFreeL2Clusters)
		}
		if off := int64(e & layout.OffsetMask); off != 0 {
			s.setL1(i, 0)
			if off&(s.cs-1) == 0 && !s.wrong.at(off>>s.cb) {
				s.own(off, ownL2, -1)
				s.l2.dropRange(off, s.cs)
				s.free(off, s.cs, discardAlways)
			}
		}
	}
	if err := s.flush(r); err != nil {
		return wrap("Failed to reduce the number of L2 tables", err)
	}
	s.reap(r, false)
	if err := s.cutFile(r); err != nil {
		return err
	}
	if s.geo.External && s.external.Size() > dataEnd {
		return s.external.Resize(ctxOf(r), dataEnd, false, blk.PreallocOff)
	}
	return nil
}

// cutFile truncates the file behind the last cluster that may be in use.
// +checklocks:s.mu
func (s *discarder) cutFile(r *blk.Req) error {
	if err := s.writeRefcounts(r); err != nil {
		return wrap("Failed to discard unused refblocks", err)
	}
	last, err := s.lastCluster(r)
	if err != nil {
		return wrap("Failed to find the last cluster", err)
	}
	if last < 0 {
		err := s.corrupt(r, -1, -1, "There are no references in the refcount table.")
		return wrap("Failed to find the last cluster", err)
	}
	// What no refcount counts may be in use all the same.
	if last = max(last, s.wrong.last); s.survey != nil {
		last = max(last, s.survey.found-1)
	}
	end := (last + 1) << s.cb
	if end >= s.file.Size() || len(s.inflight) > 0 {
		return nil
	}
	if err := s.barrier(r); err != nil {
		return wrap("Failed to truncate the tail of the image", err)
	}
	if err := s.file.Resize(ctxOf(r), end, false, blk.PreallocOff); err != nil {
		s.warnf("Failed to truncate the tail of the image: %s", err)
		return nil
	}
	// A device keeps its size, and behind the end whatever it held.
	s.fileEnd = max(end, s.file.Size())
	return nil
}

func ctxOf(r *blk.Req) context.Context {
	if r.Ctx != nil {
		return r.Ctx
	}
	return context.Background()
}

// growData makes the data file as long as the disk is to be. What it has there already becomes
// zeroes if it is going to be seen, but not that of a file which somebody makes an image for.
// +checklocks:s.mu
func (s *image) growData(r *blk.Req, old, size int64, m blk.Prealloc) error {
	have := min(s.external.Size(), size)
	if m == blk.PreallocMetadata || m == "" {
		m = blk.PreallocOff
	}
	s.wrote++
	if s.external.Size() != size {
		if err := s.external.Resize(ctxOf(r), size, false, m); err != nil {
			return err
		}
	}
	if s.bare || have <= old || s.seal != nil { // zeroes there would not read as such
		return nil
	}
	return s.external.Zero(r, old, have-old, 0)
}
