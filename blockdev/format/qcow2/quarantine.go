package qcow2

import (
	"sync/atomic"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// quarantine has the host clusters that have lost a reference and must not be used for anything
// else yet, and the epochs in which requests and leases have looked up theirs (package doc).
//
//	pending (reference gone in memory) --flush--> limbo (gone on disk) --epochs ended--> ripe
type quarantine struct {
	oldest, current *epoch
	sealed          bool // something was freed in the current epoch
	pending, limbo  []freed
	pendBytes       int64
	given           uint64 // counts the ranges that have been given back
	giving          int    // so many callers are giving something back
}

// epoch counts the requests and leases that looked up host clusters during it, and have not ended.
// It ends when a cluster is freed.
type epoch struct {
	refs atomic.Int64
	seq  uint64
	next *epoch
}

// Release ends a request's or lease's hold on the clusters it looked up.
func (e *epoch) Release() { e.refs.Add(-1) }

func newQuarantine() quarantine {
	e := &epoch{}
	return quarantine{oldest: e, current: e}
}

// hold enters the current epoch.
func (q *quarantine) hold() *epoch {
	q.turn()
	q.current.refs.Add(1)
	return q.current
}

// turn ends the current epoch if something was freed in it.
func (q *quarantine) turn() {
	if e := q.current; q.sealed {
		q.sealed = false
		q.current = &epoch{seq: e.seq + 1}
		e.next = q.current
	}
}

// add takes a range whose reference is gone in memory. Whole clusters are joined.
func (q *quarantine) add(off, n int64, kind discardKind, cs int64) {
	q.sealed = true
	q.pendBytes += n
	if k := len(q.pending) - 1; k >= 0 {
		p := &q.pending[k]
		if p.kind == kind && p.seq == q.current.seq && p.off+p.n == off && (off|n|p.off)&(cs-1) == 0 {
			p.n += n
			return
		}
	}
	q.pending = append(q.pending, freed{off, n, kind, q.current.seq})
}

// retire takes a table that has another place now: its reference has gone from the disk already.
func (q *quarantine) retire(off, n int64) {
	q.sealed = true
	q.limbo = append(q.limbo, freed{off, n, discardOther, q.current.seq})
}

// take takes what a flush that begins now will move to limbo; putBack is for one that has failed.
func (q *quarantine) take() []freed {
	l := q.pending
	q.pending, q.pendBytes = nil, 0
	return l
}

func (q *quarantine) putBack(l []freed) {
	q.pending = append(l, q.pending...)
	for _, f := range l {
		q.pendBytes += f.n
	}
}

// ripe takes out of limbo what was freed before the oldest epoch that somebody is in, or everything
// if all is set.
func (q *quarantine) ripe(all bool) []freed {
	q.turn()
	// An epoch that is not the current one never gets new members.
	for q.oldest != q.current && q.oldest.refs.Load() == 0 {
		q.oldest = q.oldest.next
	}
	var ripe []freed
	rest := q.limbo[:0]
	for _, f := range q.limbo {
		if all || f.seq < q.oldest.seq {
			ripe = append(ripe, f)
		} else {
			rest = append(rest, f)
		}
	}
	q.limbo = rest
	return ripe
}

// keepsBack tells whether there is space that is only kept back.
func (q *quarantine) keepsBack() bool { return len(q.pending)+len(q.limbo)+q.giving > 0 }

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

// free takes back one reference on each cluster that [off, off+n) touches, after the next flush.
// +checklocks:s.mu
func (s *allocator) free(off, n int64, kind discardKind) { s.quarantine.add(off, n, kind, s.cs) }

// freeEntry frees what L2 entry e refers to.
// +checklocks:s.mu
func (s *allocator) freeEntry(r *blk.Req, e uint64, kind discardKind) {
	off, n := s.geo.HostRange(e)
	switch {
	case n == 0:
	case e&layout.Compressed == 0 && off&(s.cs-1) != 0:
		s.suspect(-1, -1, "Cannot free unaligned cluster %s", hex(off))
	default:
		s.free(off, n, kind)
	}
}

// reap gives back what nobody uses any more, or, with all (on closing), everything in limbo: it is
// punched as the options say, then its refcounts go down. mu is dropped while punching and between
// batches. While a survey is under way this makes its next step, and nothing is given back but on
// closing, then without being punched.
// +checklocks:s.mu
func (s *allocator) reap(r *blk.Req, all bool) {
	q := &s.quarantine
	if s.surveying() && len(q.limbo) > 0 {
		// Before all references are known, nothing of what was found in the file is given away.
		if _ = s.vet(r); s.surveying() && !all {
			return
		}
	}
	vetted := !s.surveying()
	take := q.ripe(all)
	if len(take) == 0 {
		return
	}
	q.giving++
	defer func() {
		q.giving--
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
		q.given += uint64(len(now))
		if len(take) == 0 {
			return
		}
		s.mu.Unlock() // requests come in between
		s.mu.Lock()
	}
}

// clusters are the numbers of the first cluster that f touches, and of the one behind the last. An
// image may say that f ends where offsets do.
func (f freed) clusters(cb uint) (first, behind int64) {
	return f.off >> cb, (f.off+f.n-1)>>cb + 1
}

// maxBatch is how many clusters are given back before others get the lock: those of a large bitmap
// or snapshot are a million.
const maxBatch = 4096

// batch takes up to maxBatch clusters from the front of l, which it changes.
func batch(l []freed, cb uint) (now, rest []freed) {
	room := int64(maxBatch)
	for i, f := range l {
		first, end := f.clusters(cb)
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
// +checklocks:s.mu
func (s *allocator) punch(r *blk.Req, fs []freed) {
	var runs []span
	for _, f := range fs {
		if !s.set.discard[f.kind] {
			continue
		}
		s.step(r, blk.EvClusterFree)
		for c, end := f.clusters(s.cb); c < end; c++ {
			if n, err := s.refcount(r, c); err != nil || n != 1 || s.wrong.at(c) {
				continue
			}
			runs = with(runs, span{c << s.cb, (c + 1) << s.cb})
		}
	}
	if len(runs) == 0 {
		return
	}
	s.unlocked(func() {
		for _, x := range runs {
			if n := min(x.end, s.file.Size()) - x.off; n > 0 {
				// Failing to give space back harms nobody.
				_ = s.file.Discard(r, x.off, n)
			}
		}
	})
}

// unref lowers the refcounts of the clusters that f touches, also when the context of r has ended.
// A cluster whose refcount block cannot be read is leaked.
// +checklocks:s.mu
func (s *allocator) unref(r *blk.Req, f freed) {
	r = patient(r)
	s.step(r, blk.EvClusterFree)
	for c, end := f.clusters(s.cb); c < end; c++ {
		if s.wrong.at(c) {
			continue // others refer to it
		}
		if err := s.addRef(r, c, -1); err != nil {
			s.warnf("Leaking cluster %s: %s", hex(c<<s.cb), blk.ErrnoText(err))
		}
	}
}
