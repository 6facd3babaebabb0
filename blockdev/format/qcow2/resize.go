package qcow2

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Resize changes the size of the disk. What is added reads as zeroes. No requests may run
// beyond the smaller of both sizes.
func (s *image) Resize(r *blk.Req, size int64, m blk.Prealloc) error {
	switch m {
	case blk.PreallocOff, blk.PreallocMetadata, blk.PreallocFalloc, blk.PreallocFull, "":
	default:
		return fmt.Errorf("Unsupported preallocation mode '%s'", m)
	}
	if size&(layout.SectorSize-1) != 0 {
		return fmt.Errorf("The new size must be a multiple of %d", layout.SectorSize)
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
	if len(s.snaps) > 0 && s.hdr.Version < 3 {
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
	return s.resizeLive(r, func() error {
		if size < old {
			return s.shrink(r, old, size)
		}
		return s.grow(r, old, size, m)
	})
}

func (s *image) grow(r *blk.Req, old, size int64, m blk.Prealloc) error {
	if err := s.growL1(r, int64(s.geo.L1Entries(uint64(size)))); err != nil {
		return wrap("Failed to grow the L1 table", err)
	}
	if err := s.zeroTail(r, old, size); err != nil {
		return wrap("Failed to zero out the new area", err)
	}
	from, to := s.geo.Clusters(old), s.geo.Clusters(size)
	if m != blk.PreallocOff && m != "" && from < to {
		if err := s.preallocate(r, from, to, m); err != nil {
			return err
		}
		if err := s.flush(r); err != nil {
			return wrap("Failed to flush the preallocated area to disk", err)
		}
	} else if s.backSize() > old && from < to {
		// The backing file must not show through where the disk had ended.
		if s.hdr.Version < 3 {
			return wrap("Failed to zero out new clusters", blk.ErrNotSupported)
		}
		end := min(to, s.geo.Clusters(s.backSize()))
		err := s.eachSlice(r, from, end, true, func(t *table, gc, k int64) error {
			for j := range k {
				if err := s.zeroEntry(r, t, s.l2Index(gc)+j, false); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return wrap("Failed to zero out new clusters", err)
		}
		if err := s.flush(r); err != nil {
			return wrap("Failed to zero out new clusters", err)
		}
	}
	return s.setSize(r, size)
}

// zeroTail clears what lies between the old end and the end of its cluster. mu is held,
// and dropped for writing.
func (s *image) zeroTail(r *blk.Req, old, size int64) error {
	end := min(size, s.geo.RoundUp(old))
	if old >= end {
		return nil
	}
	m, err := s.lookup(r, old, end-old)
	if err != nil {
		return err
	}
	switch {
	case m.kind == layout.ZeroPlain || m.kind == layout.ZeroAlloc:
		return nil
	case m.kind == layout.Unallocated && s.backSize() <= old:
		return nil
	}
	b := make([]byte, end-old)
	// The copied head ends at the old size, so the disk has to have the new one already.
	s.size.Store(end)
	s.unlocked(func() { err = s.writeAt(r, blk.Buf(b), old, 0) })
	s.size.Store(old)
	return err
}

// setSize enters the size into the header. After a failure that has the old one again, unless that cannot be written either.
func (s *image) setSize(r *blk.Req, size int64) error {
	enter := func(size uint64) error {
		var b [8]byte
		be.PutUint64(b[:], size)
		return s.enter(r, b[:], layout.OffSize)
	}
	err := s.barrier(r)
	if err == nil {
		if err = enter(uint64(size)); err != nil {
			err = errors.Join(err, enter(s.hdr.Size))
		}
	}
	if err != nil {
		return wrap("Failed to update the image size", err)
	}
	s.hdr.Size = uint64(size)
	s.size.Store(size)
	// A larger disk may need a larger cache. The slice size stays.
	if set, err := s.options.resolve(s.hdr, s.unmap); err == nil {
		tables := set.l2Tables
		if set.slice != s.slice {
			tables = int(int64(set.l2Tables) * set.slice / s.slice)
		}
		s.l2.max = max(s.l2.max, tables)
	}
	return nil
}

// growL1 moves the L1 table to a place where it can have n entries.
func (s *image) growL1(r *blk.Req, n int64) error {
	if n <= int64(s.hdr.L1Size) {
		return nil
	}
	if n > layout.MaxL1Bytes/8 {
		return errTooBig
	}
	// The new table is written as it is in memory, so what its entries refer to has to be on
	// disk first; and no flush may write into the old one meanwhile.
	for again := true; again; again = s.flushing || len(s.l1Dirty) > 0 {
		if err := s.flush(r); err != nil {
			return err
		}
	}
	release := s.claimFlush()
	defer release()
	s.step(r, blk.EvL1GrowAllocTable)
	need := s.geo.Clusters(n * 8)
	c, _, err := s.allocate(r, need, need, "L1 table")
	if err != nil {
		return err
	}
	off := c << s.cb
	fail := func(err error) error {
		s.unref(r, freed{off: off, n: need << s.cb})
		return err
	}
	if err := s.writeRefcounts(r); err != nil {
		return fail(err)
	}
	s.step(r, blk.EvL1GrowWriteTable)
	const piece = 1 << 20 / 8 // entries
	b := make([]byte, 0, min(n, piece)*8)
	for first := int64(0); first < n; first += piece {
		if err := ended(r); err != nil {
			return fail(err)
		}
		b = s.l1.append(b[:0], first, min(first+piece, n))
		if err := s.writeMeta(r, b, off+8*first, 0); err != nil {
			return fail(err)
		}
	}
	if err := s.barrier(r); err != nil {
		return fail(err)
	}
	s.step(r, blk.EvL1GrowActivateTable)
	field := func(n uint32, off uint64) []byte {
		return be.AppendUint64(be.AppendUint32(nil, n), off)
	}
	if err := s.swap(r, field(uint32(n), uint64(off)), field(s.hdr.L1Size, s.hdr.L1TableOffset), layout.OffL1Size); err != nil {
		if s.dead.Load() {
			return err
		}
		return fail(err)
	}
	oldOff, oldN := int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)
	s.hdr.L1TableOffset, s.hdr.L1Size = uint64(off), uint32(n)
	if oldN > 0 {
		s.sealed = true
		s.limbo = append(s.limbo, freed{oldOff, s.geo.RoundUp(oldN * 8), discardOther, s.epCur.seq})
	}
	return nil
}

// shrink frees everything beyond size and gives the file's tail back.
func (s *image) shrink(r *blk.Req, old, size int64) error {
	if err := s.discard(r, s.geo.Clusters(size), s.geo.Clusters(old), false, true, discardAlways); err != nil {
		return wrap("Failed to discard cropped clusters", err)
	}
	keep := int64(s.geo.L1Entries(uint64(size)))
	told := false
	for i, e := range s.l1.from(keep) {
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
	// Last, so that a failure leaves the size as it was.
	return s.setSize(r, size)
}

// cutFile truncates the file behind the last cluster that may be in use.
func (s *image) cutFile(r *blk.Req) error {
	if err := s.writeRefcounts(r); err != nil {
		return wrap("Failed to discard unused refblocks", err)
	}
	last, err := s.lastCluster(r)
	if err != nil {
		return wrap("Failed to find the last cluster", err)
	}
	if last < 0 {
		return wrap("Failed to find the last cluster", s.corrupt(r, true, -1, -1, "There are no references in the refcount table."))
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

// lastCluster is the last one in the file that is counted, -1 if there is none.
func (s *image) lastCluster(r *blk.Req) (int64, error) {
	bits := s.geo.RefblockBits()
	for b := min(int64(len(s.reft)), s.countedBlocks()) - 1; b >= 0; b-- {
		if err := ended(r); err != nil {
			return 0, err
		}
		t, err := s.refblock(r, b)
		if err != nil {
			return 0, err
		}
		for i := int64(1)<<bits - 1; t != nil && i >= 0; i-- {
			if s.geo.Refcount(t.data, i) > 0 {
				return b<<bits + i, nil
			}
		}
	}
	return -1, nil
}

func ctxOf(r *blk.Req) context.Context {
	if r.Ctx != nil {
		return r.Ctx
	}
	return context.Background()
}

// preallocate gives guest clusters [from, to) host clusters. They are taken behind
// everything that was ever written, so that they read as zeroes.
func (s *image) preallocate(r *blk.Req, from, to int64, m blk.Prealloc) error {
	for gc := from; gc < to; {
		if err := s.room(r); err != nil {
			return err
		}
		k := min(to-gc, s.sliceLeft(gc))
		t, err := s.sliceForWrite(r, gc)
		if err != nil {
			return wrap("Allocating clusters failed", err)
		}
		t.pins++
		host, k, err := s.allocateEnd(r, k)
		t.pins--
		if err != nil {
			return wrap("Allocating clusters failed", err)
		}
		if err := s.extendFile(r, host+k<<s.cb, m); err != nil {
			s.unref(r, freed{off: host, n: k << s.cb})
			return err
		}
		for j := range k {
			s.setEntry(t, s.l2Index(gc)+j, uint64(host+j<<s.cb)|layout.Copied)
		}
		gc += k
	}
	return nil
}

// extendFile makes the file at least end bytes long: clusters that are in use must lie in it.
func (s *image) extendFile(r *blk.Req, end int64, m blk.Prealloc) error {
	if end <= s.file.Size() {
		return nil
	}
	s.wrote++
	if m == blk.PreallocMetadata {
		return s.file.Resize(ctxOf(r), end, false, blk.PreallocOff)
	}
	if err := s.file.Resize(ctxOf(r), end, false, m); err != nil {
		return fmt.Errorf("Failed to resize underlying file: %w", err)
	}
	return nil
}

// allocateEnd takes up to k clusters behind everything that was ever written.
func (s *image) allocateEnd(r *blk.Req, k int64) (host, n int64, err error) {
	for {
		first := s.geo.Clusters(max(s.fileEnd, s.file.Size()))
		first, n, _, err = s.findFree(r, first, 1, k)
		if err != nil {
			return 0, 0, err
		}
		again, err := s.coverRun(r, first, n)
		if err != nil {
			return 0, 0, err
		}
		if again {
			continue
		}
		if err := s.allocateAt(r, first, n); err != nil {
			return 0, 0, err
		}
		s.noteEnd((first + n) << s.cb)
		return first << s.cb, n, nil
	}
}
