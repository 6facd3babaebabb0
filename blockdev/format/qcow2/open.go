package qcow2

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// openImage opens the image in c.file. Checks come in the reference's order. A read-only
// image is not touched; a writable one gets its autoclear bits cleared and, if it is dirty,
// its refcounts repaired.
func openImage(r *blk.Req, c config) (*image, error) {
	s := &image{
		config:    c,
		l1Dirty:   map[int64]struct{}{},
		reftDirty: map[int64]struct{}{},
		epCur:     &epoch{},
		freeIdx:   0,
	}
	s.zipping.Limit, s.copying.Limit, s.unzipping.Limit, s.decoding.Limit = budgetZip, budgetCopy, budgetUnzip, budgetDecode
	s.epOld = s.epCur
	s.wake, s.done = sync.NewCond(&s.mu), sync.NewCond(&s.mu)
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	first, err := s.readHeader(r)
	if err != nil {
		return nil, err
	}
	if err := s.loadTables(r); err != nil {
		return nil, err
	}
	if s.ext, err = s.hdr.ParseExtensions(first); err != nil {
		return nil, err
	}
	if s.backName, err = s.hdr.BackingName(first); err != nil {
		return nil, err
	}
	if err := s.readSnapshots(r); err != nil {
		return nil, err
	}
	if err := s.loadBitmaps(r); err != nil {
		return nil, err
	}
	s.fileEnd = s.file.Size()
	if s.set.overlap&olInactiveL2 != 0 {
		if err := s.findInactive(r); err != nil {
			return nil, err
		}
	}
	if !s.readOnly {
		if err := s.becomeWriter(r); err != nil {
			return nil, err
		}
	}
	s.publish()
	s.startCleaning()
	return s, nil
}

func (s *image) readHeader(r *blk.Req) (first []byte, err error) {
	first = make([]byte, layout.HeaderSize)
	if err := s.readFile(r, blk.Buf(first), 0); err != nil {
		return nil, wrap("Could not read qcow2 header", err)
	}
	cs, err := layout.Peek(first)
	if err != nil {
		return nil, err
	}
	// Most headers are short; the rest of the first cluster is zeroes beyond the file's end.
	first = make([]byte, cs)
	if err := s.readFile(r, blk.Buf(first), 0); err != nil {
		return nil, wrap("Could not read unknown qcow2 header fields", err)
	}
	if s.hdr, err = layout.Parse(first, !s.readOnly); err != nil {
		return nil, err
	}
	for s.hdrUsed = cs; s.hdrUsed > 0 && first[s.hdrUsed-1] == 0; {
		s.hdrUsed--
	}
	s.geo = s.hdr.Geometry()
	s.cb, s.cs = s.geo.ClusterBits, s.geo.ClusterSize()
	s.size.Store(int64(s.hdr.Size) &^ (layout.SectorSize - 1))
	return first, nil
}

// loadTables reads L1 and refcount tables, resolves the options and makes the caches.
func (s *image) loadTables(r *blk.Req) (err error) {
	if s.l1, err = s.readTable(r, int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)); err != nil {
		return wrap("Could not read L1 table", err)
	}
	if s.set, err = s.options.resolve(s.hdr, s.unmap); err != nil {
		return err
	}
	s.makeCaches()
	s.reftSize = int64(s.hdr.RefcountTableClusters) << s.cb / 8
	s.step(r, blk.EvReftableLoad)
	reft, err := s.readTable(r, s.reftOffset(), s.reftSize)
	if err != nil {
		return wrap("Could not initialize refcount handling", err)
	}
	s.reft = reft.dense()
	// Of its size from the beginning: one that grows leaves as much behind again.
	n := len(s.reft)
	for range s.l1.all() {
		n++
	}
	s.owners = make(map[int64]owner, n)
	for _, e := range s.l1.all() {
		if off := int64(e & layout.OffsetMask); off != 0 {
			s.own(off, ownL2, 1)
		}
	}
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off > 0 {
			s.own(off, ownBlock, 1)
		}
	}
	return nil
}

func (s *image) makeCaches() {
	s.slice = s.set.slice
	s.l2 = newCache(int(s.slice), s.set.l2Tables)
	s.rb = newCache(int(s.cs), s.set.rbTables)
}

func (s *image) readSnapshots(r *blk.Req) error {
	start := int64(s.hdr.SnapshotsOffset)
	if s.snapEnd = start; s.hdr.NbSnapshots == 0 {
		return nil
	}
	q := s.sequence(r, start, s.file.Size())
	defer q.close()
	names := 0
	for i := range int(s.hdr.NbSnapshots) {
		if q.off >= q.end {
			// Zeroes would count as entries: 65536 of them for a few bytes of header.
			return wrap("Failed to read snapshot table", errInval)
		}
		h, err := q.peek(layout.SnapshotHeaderSize)
		if err != nil {
			return wrap("Failed to read snapshot table", err)
		}
		n, err := layout.SnapshotNeed(h, i)
		if err != nil {
			return err
		}
		b, err := q.peek(n)
		if err != nil {
			return wrap("Failed to read snapshot table", err)
		}
		sn := layout.ParseSnapshot(b, s.hdr.Size)
		s.snaps = append(s.snaps, sn)
		names += len(sn.ID) + len(sn.Name)
		if q.skip(n); layout.SnapshotTableTooBig(q.off-start) || names > layout.MaxNames {
			return errors.New("Snapshot table is too big")
		}
		s.snapEnd = q.off
		if pad := int(-q.off & 7); pad > 0 {
			if _, err := q.peek(pad); err != nil {
				return wrap("Failed to read snapshot table", err)
			}
			q.skip(pad)
		}
	}
	s.snapL1 = snapshotTables(s.snaps)
	return nil
}

// snapshotTables are the places of L1 tables of snapshots.
func snapshotTables(l []layout.Snapshot) ranges {
	all := make([]fileRange, 0, len(l))
	for i := range l {
		if off := int64(l[i].L1TableOffset); off >= 0 {
			all = append(all, fileRange{off, off + min(int64(l[i].L1Size)*8, math.MaxInt64-off)})
		}
	}
	return makeRanges(all)
}

// findInactive notes the L2 tables of internal snapshots for overlap-check=all. Tables that lie over each other are read once.
func (s *image) findInactive(r *blk.Req) error {
	s.inactive = map[int64]struct{}{}
	for i := range s.snaps {
		sn := &s.snaps[i]
		if err := layout.CheckTable(sn.L1TableOffset, uint64(sn.L1Size), 8, layout.MaxL1Bytes, uint64(s.cs), "Snapshot L1 table"); err != nil {
			return err
		}
	}
	for _, t := range s.snapL1 {
		l1, err := s.readTable(r, t.off, (t.end-t.off)/8)
		if err != nil {
			return wrap("Could not read L1 table", err)
		}
		for _, e := range l1.all() {
			if e&layout.OffsetMask != 0 {
				s.inactive[int64(e&layout.OffsetMask)>>s.cb] = struct{}{}
			}
		}
	}
	return nil
}

// becomeWriter does what the format asks of a program that opens an image for writing.
func (s *image) becomeWriter(r *blk.Req) error {
	if !s.bare {
		s.startSurvey()
	}
	known := uint64(0)
	if s.ext.Bitmaps != nil && !s.badBitmaps {
		known = layout.AutoclearBitmaps | layout.AutoclearMarks
	}
	if s.hdr.AutoclearFeatures&^known != 0 || s.ext.BitmapsStale || s.badBitmaps {
		hdr, ext, bad := *s.hdr, *s.ext, s.badBitmaps
		if s.ext.BitmapsStale || s.badBitmaps {
			s.warnf("The persistent bitmaps of the image were not kept up to date and are dropped; some clusters may be leaked")
			s.ext.Bitmaps, s.ext.BitmapsStale, s.badBitmaps = nil, false, false
		}
		s.hdr.AutoclearFeatures &= known
		if err := s.updateHeader(r); err != nil {
			*s.hdr, *s.ext, s.badBitmaps = hdr, ext, bad // it is still to be done
			return wrap("Could not update qcow2 header", err)
		}
	}
	// Before the bitmaps get clusters: those that are free are known after it only.
	if s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0 && !s.bare {
		res, err := s.repair(r)
		if err == nil && res.Errors > 0 {
			err = errIO
		}
		if err != nil {
			return wrap("Could not repair dirty image", err)
		}
		if s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
			s.survey = nil // all was looked at
		}
	}
	if len(s.stored) > 0 {
		// They move to new clusters, and their old ones are freed.
		if err := s.vet(r); err != nil {
			return err
		}
	}
	if err := s.claimBitmaps(r); err != nil {
		return wrap("Could not update bitmap directory", err)
	}
	return nil
}

// updateHeader writes header, extensions and backing file name. mu is held.
func (s *image) updateHeader(r *blk.Req) error {
	b, err := s.hdr.Marshal(s.ext, s.backName)
	if err != nil && len(s.ext.Marks) > 0 {
		// All else that the header has comes first: bitmaps are in use then, as others have them.
		s.warnf("The header has no room for the marks: persistent bitmaps will count as inconsistent if they are not stored in the end")
		s.dropMarks()
		b, err = s.hdr.Marshal(s.ext, s.backName)
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
	s.hdrUsed = used
	s.publish()
	return nil
}

// startCleaning gives unused cache entries back every now and then.
func (s *image) startCleaning() {
	if s.set.cleanInterval == 0 {
		return
	}
	d := time.Duration(s.set.cleanInterval) * time.Second
	var t *time.Timer
	t = panics.AfterFunc("the cleaning of qcow2 caches", d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.closed {
			return
		}
		s.l2.clean()
		s.rb.clean()
		t.Reset(d)
	})
	s.stopClean = func() { t.Stop() }
}

// wrap words an error of I/O as "text: errno in words" and keeps err in the chain.
func wrap(text string, err error) error { return blk.Errnof(err, "%s", text) }

func (s *image) warnf(format string, args ...any) {
	if s.warn != nil {
		s.warn(fmt.Sprintf(format, args...))
	}
}
