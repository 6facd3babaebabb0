package qcow2

import (
	"errors"
	"sync/atomic"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// epoch counts the requests and leases that looked up host clusters during it. It ends when
// a cluster is freed. It is the lease of mapped ranges.
type epoch struct {
	refs atomic.Int64
	seq  uint64
	next *epoch
}

// Release ends a request's or lease's hold on the clusters it looked up.
func (e *epoch) Release() { e.refs.Add(-1) }

// hold enters the current epoch; mu is held.
func (s *image) hold() *epoch {
	s.turn()
	s.epCur.refs.Add(1)
	return s.epCur
}

// turn ends the current epoch if something was freed in it.
func (s *image) turn() {
	if e := s.epCur; s.sealed {
		s.sealed = false
		s.epCur = &epoch{seq: e.seq + 1}
		e.next = s.epCur
	}
}

// oldest is the number of the oldest epoch that somebody is in, or of the current one; mu
// is held. An epoch that is not the current one never gets new members.
func (s *image) oldest() uint64 {
	s.turn()
	for s.epOld != s.epCur && s.epOld.refs.Load() == 0 {
		s.epOld = s.epOld.next
	}
	return s.epOld.seq
}

// discardKind says which option decides whether a freed cluster is punched.
type discardKind uint8

const (
	discardNever discardKind = iota
	discardAlways
	discardRequest
	discardSnapshot
	discardOther
)

// freed is a host range that lost one reference.
type freed struct {
	off, n int64 // bytes; clusters touched lose one reference each
	kind   discardKind
	seq    uint64 // requests up to this epoch may still use it
}

// maxPending is how much may wait for a flush before one is made.
const maxPending = 64 << 20

// free takes back one reference on each cluster that [off, off+n) touches, after the next
// flush. mu is held.
func (s *image) free(off, n int64, kind discardKind) {
	s.sealed = true
	s.pendBytes += n
	if k := len(s.pending) - 1; k >= 0 {
		p := &s.pending[k]
		if p.kind == kind && p.seq == s.epCur.seq && p.off+p.n == off && (off|n|p.off)&(s.cs-1) == 0 {
			p.n += n
			return
		}
	}
	s.pending = append(s.pending, freed{off, n, kind, s.epCur.seq})
}

// freeEntry frees what L2 entry e refers to.
func (s *image) freeEntry(r *blk.Req, e uint64, kind discardKind) {
	switch k := layout.KindOf(e); {
	case k == layout.CompressedKind:
		off, n := s.geo.CompressedRange(e)
		s.free(off, n, kind)
	case k.HasHost():
		off := int64(e & layout.OffsetMask)
		if off&(s.cs-1) != 0 {
			s.corrupt(r, false, -1, -1, "Cannot free unaligned cluster "+hex(uint64(off)))
			return
		}
		s.free(off, s.cs, kind)
	}
}

// reap gives back what nobody uses any more: clusters in limbo whose epochs have ended are
// punched if so asked for, then their refcounts go down. mu is held, and dropped while
// punching and between batches. all takes everything (close).
// While a survey is under way it makes the next step of that, and nothing is given back but at close, then without being punched.
func (s *image) reap(r *blk.Req, all bool) {
	vetted := s.survey == nil || s.survey.endless
	if !vetted && len(s.limbo) > 0 {
		// Before all references are known, nothing of what was found in the file is given away.
		if _ = s.vet(r); s.survey != nil && !s.survey.endless && !all {
			return
		}
		vetted = s.survey == nil || s.survey.endless
	}
	old := s.oldest()
	var take []freed
	rest := s.limbo[:0]
	for _, f := range s.limbo {
		if all || f.seq < old {
			take = append(take, f)
		} else {
			rest = append(rest, f)
		}
	}
	s.limbo = rest
	if len(take) == 0 {
		return
	}
	s.giving++
	defer func() {
		s.giving--
		s.done.Broadcast()
	}()
	for {
		var now []freed
		now, take = batch(take, s.cb)
		if !s.dead.Load() && vetted {
			s.punch(r, now)
		}
		for _, f := range now {
			s.unref(r, f)
		}
		s.given += uint64(len(now))
		if len(take) == 0 {
			return
		}
		s.mu.Unlock() // requests come in between
		s.mu.Lock()
	}
}

// maxBatch is how many clusters are given back, or let go, before others get the lock: those of a large bitmap or snapshot are a million.
const maxBatch = 4096

// batch takes maxBatch clusters, or all if there are no more, from the front of l, which it changes.
func batch(l []freed, cb uint) (now, rest []freed) {
	room := int64(maxBatch)
	for i, f := range l {
		first, end := f.off>>cb, (f.off+f.n+1<<cb-1)>>cb
		if room == 0 {
			return now, l[i:]
		}
		if end-first > room {
			cut := (first + room) << cb
			head := f
			head.n = cut - f.off
			l[i].off, l[i].n = cut, f.off+f.n-cut
			return append(now, head), l[i:]
		}
		room -= end - first
		now = append(now, f)
	}
	return now, nil
}

// punch discards ranges that lose their last reference.
func (s *image) punch(r *blk.Req, fs []freed) {
	var runs []freed
	for _, f := range fs {
		if !s.set.discard[f.kind] {
			continue
		}
		s.step(r, blk.EvClusterFree)
		for c := f.off >> s.cb; c<<s.cb < f.off+f.n; c++ {
			if n, err := s.refcount(r, c); err != nil || n != 1 || s.wrong.at(c) {
				continue
			}
			if k := len(runs) - 1; k >= 0 && runs[k].off+runs[k].n == c<<s.cb {
				runs[k].n += s.cs
			} else {
				runs = append(runs, freed{off: c << s.cb, n: s.cs})
			}
		}
	}
	if len(runs) == 0 {
		return
	}
	s.unlocked(func() {
		for _, f := range runs {
			if n := min(f.n, s.file.Size()-f.off); n > 0 {
				// Failing to give space back harms nobody.
				_ = s.file.Discard(r, f.off, n)
			}
		}
	})
}

// unref lowers the refcounts of the clusters that f touches, also when the context of r has ended. A cluster whose refcount block
// cannot be read is leaked.
func (s *image) unref(r *blk.Req, f freed) {
	r = patient(r)
	s.step(r, blk.EvClusterFree)
	for c := f.off >> s.cb; c<<s.cb < f.off+f.n; c++ {
		if s.wrong.at(c) {
			continue // others refer to it
		}
		if err := s.addRef(r, c, -1); err != nil {
			s.warnf("Leaking cluster %s: %s", hex(uint64(c<<s.cb)), blk.ErrnoText(err))
		}
	}
}

// maxRetries is how often a request that found no space is tried again after some was given out: others may be quicker.
const maxRetries = 3

// keepsBack tells whether there is space that is only kept back.
func (s *image) keepsBack() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending)+len(s.limbo)+s.giving > 0
}

// giveSpace tells, after a request has failed with err, whether it is worth trying again: there was no space, and some that was only kept back has
// been given out. It blocks.
func (s *image) giveSpace(r *blk.Req, err error) bool {
	if r.NoWait || !errors.Is(err, errNoSpace) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.giveOut(r, err)
}

// giveOut is giveSpace with mu held; it is dropped in between.
func (s *image) giveOut(r *blk.Req, err error) bool {
	if !errors.Is(err, errNoSpace) || s.usable() != nil {
		return false
	}
	found := s.survey != nil
	if found {
		v := s.survey
		if s.vetAll(r) != nil || v.failed > 0 {
			return false
		}
		if v = s.survey; v != nil { // it could not be made, but there is no other place
			s.wrong.last = max(s.wrong.last, v.found-1) // all may be wrong
			s.survey = nil
		}
	}
	before := s.given
	for s.giving > 0 {
		s.done.Wait() // for what others give back
	}
	if len(s.pending)+len(s.limbo) > 0 && s.flush(r) != nil {
		return false
	}
	return found || s.given != before
}
