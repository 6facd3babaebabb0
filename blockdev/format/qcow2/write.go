package qcow2

import (
	"errors"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// WriteAt writes v at off. With blk.Compressed it stores whole clusters compressed.
func (s *image) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	err := s.writeMarked(r, v, off, f)
	for again := 0; err != nil && again < maxRetries && s.giveSpace(r, err); again++ {
		err = s.writeMarked(r, v, off, f)
	}
	return err
}

func (s *image) writeMarked(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := s.mark(r, off, v.Len(), f); err != nil {
		return err
	}
	return s.writeAt(r, v, off, f)
}

// writeAt is WriteAt of what bitmaps need not know.
func (s *image) writeAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if f&blk.Compressed != 0 {
		return s.writeCompressed(r, v, off, f)
	}
	n := v.Len()
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
			err = s.file.WriteAt(r, w, p.host, 0)
			p.epoch.Release()
		} else {
			err = s.writeAlloc(r, &p, w, off+done)
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
	epoch *epoch // held while writing in place
	alloc *alloc // nil: in place
	// Old state of the first and last cluster of an allocation, for copying what is not written.
	head, tail mapping
}

// planWrite decides how the bytes from off, at most n, are written, and allocates for them.
// It waits for allocations that are in flight in the first cluster.
func (s *image) planWrite(r *blk.Req, off, n int64) (plan, error) {
	if !s.lock(r) {
		return plan{}, blk.ErrWouldBlock
	}
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
			warmed = true // once: other reasons to wait are looked at again
			continue
		}
		if len(s.inflight) == 0 || s.inflightAt(gc) == nil {
			break
		}
		if r.NoWait {
			return plan{}, blk.ErrWouldBlock
		}
		s.wake.Wait()
	}
	k := min(s.geo.Clusters(in+n), s.sliceLeft(gc))
	if len(s.inflight) > 0 {
		k = s.untilInflight(gc, k)
	}
	t, err := s.loadSlice(r, gc)
	if err != nil {
		return plan{}, err
	}
	if t != nil {
		i := s.l2Index(gc)
		e := entry(t, i)
		if e&layout.Copied != 0 && layout.KindOf(e) == layout.Normal {
			return s.planInPlace(r, t, i, k, in, n)
		}
	}
	if r.NoWait {
		return plan{}, blk.ErrWouldBlock
	}
	return s.planAlloc(r, gc, k, in, n)
}

// planInPlace overwrites a run of up to k clusters that lie side by side and are not shared.
func (s *image) planInPlace(r *blk.Req, t *table, i, k, in, n int64) (plan, error) {
	e := entry(t, i)
	host := int64(e & layout.OffsetMask)
	if host&(s.cs-1) != 0 {
		return plan{}, s.corrupt(r, -1, -1, "Data cluster offset %s unaligned (guest offset: %s)", hex(host), hex(in))
	}
	run := int64(1)
	for run < k && entry(t, i+run) == e+uint64(run<<s.cb) {
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
	if err := s.checkOverlap(r, host+in, m, 0); err != nil {
		return plan{}, err
	}
	if err := s.checkOwner(r, host+in, m); err != nil {
		return plan{}, err
	}
	return plan{n: m, host: host + in, epoch: s.quarantine.hold()}, nil
}

// planAlloc allocates for a run of up to k clusters from gc, none of which can be written in place.
func (s *image) planAlloc(r *blk.Req, gc, k, in, n int64) (plan, error) {
	if err := s.setDirtyBit(r); err != nil {
		return plan{}, err
	}
	t, err := s.sliceForWrite(r, gc)
	if err != nil {
		return plan{}, err
	}
	i := s.l2Index(gc)
	a := &alloc{first: gc}
	first := entry(t, i)
	if err := s.checkEntry(r, layout.KindOf(first), first, gc); err != nil {
		return plan{}, err
	}
	if reusable(first) {
		a.reuse, a.host, a.n = true, int64(first&layout.OffsetMask), 1
		for a.n < k && entry(t, i+a.n) == first+uint64(a.n<<s.cb) {
			a.n++
		}
		if err := s.checkOwner(r, a.host, a.n<<s.cb); err != nil {
			return plan{}, err
		}
	} else {
		run := int64(0)
		for run < k {
			e := entry(t, i+run)
			if run > 0 && (e&layout.Copied != 0 && layout.KindOf(e) == layout.Normal || reusable(e)) {
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
		a.fresh = a.host >= end
		s.noteEnd(a.host + got<<s.cb)
		s.dataEnd = max(s.dataEnd, a.host+got<<s.cb)
	}
	p := plan{n: min(n, a.n<<s.cb-in), host: a.host + in, alloc: a}
	p.head = s.oldState(first)
	p.tail = s.oldState(entry(t, i+a.n-1))
	if err := s.checkOverlap(r, a.host, a.n<<s.cb, 0); err != nil {
		s.abort(r, a)
		return plan{}, err
	}
	s.inflight = append(s.inflight, a)
	return p, nil
}

// reusable tells whether e is a zero cluster whose host cluster can take data.
func reusable(e uint64) bool {
	return e&layout.Copied != 0 && layout.KindOf(e) == layout.ZeroAlloc
}

func (s *image) oldState(e uint64) mapping {
	return mapping{kind: layout.KindOf(e), entry: e, host: int64(e & layout.OffsetMask)}
}

// inflightAt returns the allocation in flight in guest cluster gc; mu is held.
func (s *image) inflightAt(gc int64) *alloc {
	for _, a := range s.inflight {
		if a.first <= gc && gc < a.first+a.n {
			return a
		}
	}
	return nil
}

// untilInflight shortens a run of k clusters from gc so that it ends before the next allocation in
// flight.
func (s *image) untilInflight(gc, k int64) int64 {
	for _, a := range s.inflight {
		if gc < a.first && a.first < gc+k {
			k = a.first - gc
		}
	}
	return k
}

// waitInflight waits until no allocation is in flight within k clusters from gc, or the image has
// been given up; mu is held, and dropped while waiting (then waited is true).
func (s *image) waitInflight(gc, k int64) (waited bool) {
	for (s.inflightAt(gc) != nil || s.untilInflight(gc, k) != k) && s.usable() == nil {
		waited = true
		s.wake.Wait()
	}
	return waited
}

// ended removes a from the allocations in flight; mu is held.
func (s *image) ended(a *alloc) {
	for i, x := range s.inflight {
		if x == a {
			last := len(s.inflight) - 1
			s.inflight[i], s.inflight[last] = s.inflight[last], nil
			s.inflight = s.inflight[:last]
			s.wake.Broadcast()
			return
		}
	}
}

// abort gives back what a took; nothing refers to it. mu is held.
func (s *image) abort(r *blk.Req, a *alloc) {
	if !a.reuse && !s.dead.Load() {
		s.unref(r, freed{off: a.host, n: a.n << s.cb})
	}
	s.ended(a)
}

// writeAlloc writes w into the clusters of p together with what has to be copied around
// it, then enters them into the L2 table.
func (s *image) writeAlloc(r *blk.Req, p *plan, w blk.Vec, off int64) error {
	err := s.writeAround(r, p, w, off)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		err = s.link(r, p.alloc)
	}
	if err != nil {
		s.abort(r, p.alloc)
		return err
	}
	s.ended(p.alloc)
	return nil
}

// link makes the L2 entries of a point to its clusters; mu is held.
func (s *image) link(r *blk.Req, a *alloc) error {
	if err := s.usable(); err != nil {
		return err
	}
	s.wrote++
	t, err := s.sliceForWrite(r, a.first)
	if err != nil {
		return err
	}
	i := s.l2Index(a.first)
	for k := range a.n {
		old := entry(t, i+k)
		s.setEntry(t, i+k, uint64(a.host+k<<s.cb)|layout.Copied)
		if !a.reuse {
			s.freeEntry(r, old, discardNever)
		}
	}
	return nil
}
