package qcow2

import (
	"cmp"
	"errors"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// alloc is an allocation whose data are being written; the L2 entries still hold the old state.
type alloc struct {
	first, n int64 // guest clusters
	host     int64
	zipped   int64 // bytes of compressed data for the one cluster; 0: it is not compressed
	reuse    bool  // the place that the entry has, or has to have, is written
	from, to int64 // of the disk, which is written
	fresh    bool  // the host clusters were never written and read as zeroes
}

// inflight are the allocations whose data are being written.
type inflight []*alloc

// at returns the one in guest cluster gc, or nil.
func (l inflight) at(gc int64) *alloc {
	for _, a := range l {
		if a.first <= gc && gc < a.first+a.n {
			return a
		}
	}
	return nil
}

// until shortens a run of k clusters from gc so that it ends before the next one.
func (l inflight) until(gc, k int64) int64 {
	for _, a := range l {
		if gc < a.first && a.first < gc+k {
			k = a.first - gc
		}
	}
	return k
}

// WriteAt writes v at off. With blk.Compressed it stores whole clusters compressed.
func (s *requests) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	err := s.writeMarked(r, v, off, f)
	for again := 0; err != nil && again < maxRetries && s.giveSpace(r, err); again++ {
		err = s.writeMarked(r, v, off, f)
	}
	return err
}

func (s *requests) writeMarked(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := s.mark(r, off, v.Len(), f); err != nil {
		return err
	}
	return s.writeAt(r, v, off, f)
}

// writeAt is WriteAt for what bitmaps do not record.
func (s *requests) writeAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if f&blk.Compressed != 0 {
		return s.writeCompressed(r, v, off, f)
	}
	n := v.Len()
	if r.NoWait && s.splits(n) {
		return blk.ErrWouldBlock // the second part might have to, with the first one written
	}
	for done := int64(0); done < n; {
		p, err := s.planWrite(r, off+done, n-done)
		if err != nil {
			return err
		}
		w := v
		if done != 0 || p.n != n {
			w = v.Slice(done, p.n)
		}
		if p.alloc == nil {
			s.step(r, blk.EvWriteAio)
			err = s.writeData(r, w, p.host, off+done)
			p.epoch.Release()
		} else {
			err = s.finish(r, p.alloc, s.writeAround(r, &p, w, off+done))
		}
		if err != nil {
			return err
		}
		done += p.n
	}
	return nil
}

// plan is how a part of a write is done.
type plan struct {
	n     int64  // bytes
	host  int64  // file offset of the first byte
	epoch *epoch // the writer is in it while it writes in place
	alloc *alloc // nil: in place
	// [from, to) of the disk is what an allocation writes, clusters as a whole.
	from, to int64
	// head and tail are the old state of the first and last cluster of an allocation, for copying
	// what is not written.
	head, tail cell
}

// planWrite decides how the bytes from off, at most n, are written, and allocates for them. It
// waits for the allocation in flight in the first cluster, if there is one.
func (s *requests) planWrite(r *blk.Req, off, n int64) (plan, error) {
	if !s.lock(r) {
		return plan{}, blk.ErrWouldBlock
	}
	s.locked()
	defer s.mu.Unlock()
	gc := off >> s.cb
	in := off & (s.cs - 1)
	for warmed := false; ; {
		if err := s.usable(); err != nil {
			return plan{}, err
		}
		if err := s.room(r); err != nil {
			return plan{}, err
		}
		if !warmed && s.warm(r, gc) {
			warmed = true // once; all else is looked at again
			continue
		}
		if s.inflight.at(gc) == nil {
			break
		}
		if r.NoWait {
			return plan{}, blk.ErrWouldBlock
		}
		s.wake.Wait()
	}
	k := s.inflight.until(gc, min(s.geo.Clusters(in+n), s.sliceLeft(gc)))
	t, err := s.loadSlice(r, gc)
	if err != nil {
		return plan{}, err
	}
	if s.geo.Extended {
		return s.planSubs(r, t, gc, k, in, n)
	}
	if t != nil {
		i := s.l2Index(gc)
		e := s.entry(t, i)
		if e&layout.Copied != 0 && s.geo.KindOf(e) == layout.Normal {
			return s.planInPlace(r, t, gc, k, in, n)
		}
	}
	if r.NoWait {
		return plan{}, blk.ErrWouldBlock
	}
	return s.planAlloc(r, gc, k, in, n)
}

// planInPlace is for overwriting a run of up to k clusters that lie side by side and are not
// shared.
// +checklocks:s.mu
func (s *requests) planInPlace(r *blk.Req, t *table, gc, k, in, n int64) (plan, error) {
	i := s.l2Index(gc)
	e := s.entry(t, i)
	host := int64(e & layout.OffsetMask)
	if host&(s.cs-1) != 0 {
		return plan{}, s.corrupt(r, -1, -1, "Data cluster offset %s unaligned (guest offset: %s)", hex(host), hex(in))
	}
	run := int64(1)
	for run < k && s.entry(t, i+run) == e+uint64(run<<s.cb) {
		run++
	}
	m := min(n, run<<s.cb-in)
	if r.NoWait && m != n {
		return plan{}, blk.ErrWouldBlock
	}
	if s.survey != nil {
		var unwalked unwalkedError // the table stays as it is, and the entry has been read
		if err := s.vetTable(r, s.geo.RoundDown(t.off)); err != nil && !errors.As(err, &unwalked) {
			return plan{}, err
		}
	}
	if s.geo.External {
		if err := s.checkEntry(r, layout.Normal, e, gc); err != nil {
			return plan{}, err
		}
	} else if err := s.mayWrite(r, host+in, m, 0); err != nil {
		return plan{}, err
	}
	return plan{n: m, host: host + in, epoch: s.quarantine.hold()}, nil
}

// planAlloc allocates for a run of up to k clusters from gc that cannot be written in place.
// +checklocks:s.mu
func (s *requests) planAlloc(r *blk.Req, gc, k, in, n int64) (plan, error) {
	if err := s.setDirtyBit(r); err != nil {
		return plan{}, err
	}
	t, err := s.sliceForWrite(r, gc)
	if err != nil {
		return plan{}, err
	}
	i := s.l2Index(gc)
	a := &alloc{first: gc}
	first := s.entry(t, i)
	if err := s.checkEntry(r, s.geo.KindOf(first), first, gc); err != nil {
		return plan{}, err
	}
	if s.geo.External {
		s.planExternal(t, a, k)
	} else if s.reusable(first) {
		a.reuse, a.host, a.n = true, int64(first&layout.OffsetMask), 1
		for a.n < k && s.entry(t, i+a.n) == first+uint64(a.n<<s.cb) {
			a.n++
		}
		if err := s.checkOwner(r, a.host, a.n<<s.cb); err != nil {
			return plan{}, err
		}
	} else {
		run := int64(0)
		for run < k {
			e := s.entry(t, i+run)
			if run > 0 && (e&layout.Copied != 0 && s.geo.KindOf(e) == layout.Normal || s.reusable(e)) {
				break
			}
			if err := s.canFree(r, e); err != nil {
				return plan{}, err
			}
			run++
		}
		t.pins++ // allocating may need other tables
		end := s.fileEnd
		c, got, err := s.allocate(r, 1, run, "data cluster")
		t.pins--
		if err != nil {
			return plan{}, err
		}
		a.host, a.n = c<<s.cb, got
		a.fresh = s.unwritten(a.host, end)
		s.noteEnd(a.host + got<<s.cb)
		s.dataEnd = max(s.dataEnd, a.host+got<<s.cb)
	}
	p := plan{n: min(n, a.n<<s.cb-in), host: a.host + in, alloc: a, from: gc << s.cb, to: (gc + a.n) << s.cb}
	p.head, p.tail = cell{word: first}, cell{word: s.entry(t, i+a.n-1)}
	if s.geo.External {
		p.to = min(p.to, s.size.Load()) // the file shall not become longer than the disk
	} else if err := s.checkOverlap(r, a.host, a.n<<s.cb, 0); err != nil {
		s.abort(r, a)
		return plan{}, err
	}
	s.inflight = append(s.inflight, a)
	return p, nil
}

// planExternal places a, of up to k clusters, in the other file: there is only one place.
// +checklocks:s.mu
func (s *requests) planExternal(t *table, a *alloc, k int64) {
	a.reuse, a.host = true, a.first<<s.cb
	a.fresh = s.unwritten(a.host, s.data().Size())
	for i := s.l2Index(a.first); a.n < k; a.n++ {
		if e := s.entry(t, i+a.n); a.n > 0 && e&layout.Copied != 0 && s.geo.KindOf(e) == layout.Normal {
			break
		}
	}
}

// reusable tells whether e is a zero cluster whose host cluster can take data.
// +checklocks:s.mu
func (s *tables) reusable(e uint64) bool {
	return e&layout.Copied != 0 && s.geo.KindOf(e) == layout.ZeroAlloc
}

// waitInflight waits until no allocation is in flight within k clusters from gc, or the image has
// been given up. waited tells that mu was dropped.
// +checklocks:s.mu
func (s *discarder) waitInflight(gc, k int64) (waited bool) {
	for (s.inflight.at(gc) != nil || s.inflight.until(gc, k) != k) && s.usable() == nil {
		waited = true
		s.wake.Wait()
	}
	return waited
}

// endAlloc removes a from the allocations in flight.
// +checklocks:s.mu
func (s *discarder) endAlloc(a *alloc) {
	if i := slices.Index(s.inflight, a); i >= 0 {
		s.inflight = slices.Delete(s.inflight, i, i+1)
		s.wake.Broadcast()
	}
}

// abort gives back what a took; nothing refers to it.
// +checklocks:s.mu
func (s *requests) abort(r *blk.Req, a *alloc) {
	if !a.reuse && !s.dead.Load() {
		s.unref(r, freed{off: a.host, n: cmp.Or(a.zipped, a.n<<s.cb)})
	}
	s.endAlloc(a)
}

// finish ends an allocation: its clusters are entered into the L2 table, or given back after an
// error of writing to them.
func (s *requests) finish(r *blk.Req, a *alloc, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		err = s.link(r, a)
	}
	if err != nil {
		s.abort(r, a)
		return err
	}
	s.endAlloc(a)
	return nil
}

// link makes the L2 entries of a refer to its clusters.
// +checklocks:s.mu
func (s *requests) link(r *blk.Req, a *alloc) error {
	if err := s.usable(); err != nil {
		return err
	}
	s.wrote++
	t, err := s.sliceForWrite(r, a.first)
	if err != nil {
		return err
	}
	i := s.l2Index(a.first)
	if a.zipped != 0 {
		s.step(r, blk.EvL2UpdateCompressed)
		old := s.entry(t, i)
		s.setCell(t, i, cell{word: s.geo.CompressedEntry(a.host, a.zipped)})
		s.freeEntry(r, old, discardRequest)
		return nil
	}
	if s.geo.Extended {
		s.linkSubs(r, t, i, a)
		return nil
	}
	for k := range a.n {
		old := s.entry(t, i+k)
		s.setEntry(t, i+k, uint64(a.host+k<<s.cb)|layout.Copied)
		if !a.reuse {
			s.freeEntry(r, old, discardNever)
		}
	}
	return nil
}
