package qcow2

import (
	"errors"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// flusher writes what has changed, in the order of the package doc. Its methods need mu.
type flusher struct {
	tables

	flushing bool // +checklocks:mu
	// midFlush: a flush is under way that has not come to its end, or never will.
	midFlush bool // +checklocks:mu
	// started counts the flushes begun; finished is the newest of them that succeeded.
	started  uint64 // +checklocks:mu
	finished uint64 // +checklocks:mu
}

// flushDead is flush of an image that was given up. What was acknowledged is there if nothing was
// to be written but guest data.
// +checklocks:s.mu
func (s *flusher) flushDead(r *blk.Req) error {
	lost := s.midFlush || s.l2.ndirty > 0 || len(s.l1Dirty) > 0 || len(s.reftDirty) > 0 ||
		!s.lazy() && s.rb.ndirty > 0
	if err := s.flushFiles(r); err != nil {
		return err
	}
	if lost {
		return errIO
	}
	return nil
}

// flush is Flush with mu held; it is dropped in between. Callers that come while a flush runs share
// the next one.
// +checklocks:s.mu
func (s *flusher) flush(r *blk.Req) error {
	want := s.started + 1
	for s.flushing {
		s.done.Wait()
		if s.finished >= want {
			return nil
		}
	}
	s.flushing = true
	defer s.endFlush()
	if s.dead.Load() {
		return s.flushDead(r)
	}
	s.started++
	mine := s.started
	// After a panic those who wait are here before the node hears of it, and what was taken to be
	// written is in no list any more.
	s.midFlush = true
	defer func() {
		if s.midFlush {
			s.dead.Store(true)
		}
	}()
	err := s.flushOnce(r)
	s.midFlush = false
	if err == nil {
		s.finished = mine
	}
	return err
}

// +checklocks:s.mu
func (s *flusher) endFlush() {
	s.flushing = false
	s.done.Broadcast()
}

// claimFlush waits until no flush runs and keeps others from starting: L1 table and header hold
// still then. mu is dropped while waiting. release undoes it.
// +checklocks:s.mu
func (s *flusher) claimFlush() (release func()) {
	for s.flushing {
		s.done.Wait()
	}
	s.flushing = true
	return s.endFlush
}

// copied is a piece of metadata as it is to be written.
type copied struct {
	off  int64
	data []byte
	t    *table // of an L2 slice; nil for L1
	gen  uint64
	l1   int64 // group of L1 entries
}

// flushOnce writes everything in the order of the package doc; flushing is set.
// +checklocks:s.mu
func (s *flusher) flushOnce(r *blk.Req) error {
	if !s.lazy() {
		if err := s.writeRefcounts(r); err != nil {
			return err
		}
	}
	l2, l1 := s.takeL2(), s.takeL1()
	frees := s.quarantine.take()
	upTo := s.wrote
	due := s.synced != upTo
	err := s.checkCopies(r, l2, olActiveL2)
	if err == nil {
		err = s.checkCopies(r, l1, olActiveL1)
	}
	if err == nil {
		s.unlocked(func() { err = s.writeCopies(r, l2, l1, due) })
	}
	s.l2.epoch++
	for _, c := range l2 {
		c.t.pins--
		if err == nil && c.t.gen == c.gen {
			s.l2.markClean(c.t)
		}
	}
	if err != nil {
		for _, c := range l1 {
			s.l1Dirty[c.l1] = struct{}{}
		}
		s.quarantine.putBack(frees)
		return err
	}
	s.synced = max(s.synced, upTo)
	s.quarantine.limbo = append(s.quarantine.limbo, frees...)
	s.reap(r, false)
	return nil
}

// room makes a flush when it is due: too much waits to be freed, or the L2 cache holds hardly
// anything but changes and will have to give something up. It is called before anything was looked
// up, as it drops mu. It fails if the image was given up meanwhile.
// +checklocks:s.mu
func (s *flusher) room(r *blk.Req) error {
	full := s.l2.full() && s.l2.ndirty >= s.l2.max-s.l2.max/4 && !s.allFits()
	if full || s.quarantine.pendBytes >= maxPending {
		if r.NoWait {
			return blk.ErrWouldBlock
		}
		err := s.flush(r)
		if s.dead.Load() {
			return s.usable()
		}
		return err
	}
	if len(s.quarantine.limbo) > 0 && !r.NoWait {
		if s.reap(r, false); s.dead.Load() {
			return s.usable()
		}
	}
	// Pinned or dirty tables may have made the cache grow.
	for len(s.l2.m) > s.l2.max {
		t := s.l2.victim(func(t *table) bool { return !t.dirty })
		if t == nil {
			break
		}
		s.l2.drop(t)
	}
	return nil
}

// markClean writes accurate refcounts and clears the dirty bit. All else is flushed.
// +checklocks:s.mu
func (s *flusher) markClean(r *blk.Req) error {
	if err := s.syncRefcounts(r); err != nil {
		return err
	}
	if s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
		return nil
	}
	return s.writeIncompat(r, s.hdr.IncompatibleFeatures&^layout.IncompatDirty)
}

// maxRetries is how often a request that found no space is tried again.
const maxRetries = 3

// keepsBack tells whether there is space that is only kept back.
func (s *flusher) keepsBack() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.quarantine.keepsBack()
}

// retry does f, and again while that is worth it: others may be quicker to take what was given out.
// (WriteAt does without, as calling a closure takes a tenth of its own time.)
func (s *flusher) retry(r *blk.Req, f func() error) error {
	err := f()
	for again := 0; err != nil && again < maxRetries && s.giveSpace(r, err); again++ {
		err = f()
	}
	return err
}

// giveSpace is called when a request has failed with err. It tells whether it is worth trying
// again: there was no space, and some that was only kept back has been given out. It blocks.
func (s *flusher) giveSpace(r *blk.Req, err error) bool {
	if r.NoWait || !errors.Is(err, errNoSpace) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.giveOut(r, err)
}

// giveOut is giveSpace with mu held; it is dropped in between.
// +checklocks:s.mu
func (s *flusher) giveOut(r *blk.Req, err error) bool {
	if !errors.Is(err, errNoSpace) || s.usable() != nil {
		return false
	}
	found := s.survey != nil
	if found {
		v := s.survey
		if s.vetAll(r) != nil || v.failed > 0 {
			return false
		}
		if s.survey != nil { // it could not be made, but there is no other place
			s.wrong.last = max(s.wrong.last, v.found-1) // all may be wrong
			s.endSurvey()
		}
	}
	q := &s.quarantine
	before := q.given
	for q.giving > 0 {
		s.done.Wait() // for what others give back
	}
	if len(q.pending)+len(q.limbo) > 0 && s.flush(r) != nil {
		return false
	}
	return found || q.given != before
}

// growL1 moves the L1 table to a place where it can have n entries.
// +checklocks:s.mu
func (s *flusher) growL1(r *blk.Req, n int64) error {
	if n <= int64(s.hdr.L1Size) {
		return nil
	}
	if n > layout.MaxL1Bytes/8 {
		return errTooBig
	}
	// The new table is written as it is in memory, so what its entries refer to has to be on disk
	// first; and no flush may write into the old one meanwhile.
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
	if err = s.moveL1(r, c<<s.cb, n); err != nil && !s.dead.Load() {
		s.unref(r, freed{off: c << s.cb, n: need << s.cb})
	}
	return err
}

// moveL1 writes the L1 table with n entries at off and makes the header refer to it.
// +checklocks:s.mu
func (s *flusher) moveL1(r *blk.Req, off, n int64) error {
	if err := s.writeL1(r, &s.l1, off, n); err != nil {
		return err
	}
	s.step(r, blk.EvL1GrowActivateTable)
	was := be.AppendUint64(be.AppendUint32(nil, s.hdr.L1Size), s.hdr.L1TableOffset)
	now := be.AppendUint64(be.AppendUint32(nil, uint32(n)), uint64(off))
	if err := s.swap(r, now, was, layout.OffL1Size); err != nil {
		return err
	}
	oldOff, oldN := int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)
	s.hdr.L1TableOffset, s.hdr.L1Size = uint64(off), uint32(n)
	if oldN > 0 {
		s.quarantine.retire(oldOff, s.geo.RoundUp(oldN*8))
	}
	return nil
}

// writeL1 writes l1 with n entries at off, and waits until that and the refcounts are on stable
// storage.
// +checklocks:s.mu
func (s *flusher) writeL1(r *blk.Req, l1 *entries, off, n int64) error {
	if err := s.writeRefcounts(r); err != nil {
		return err
	}
	s.step(r, blk.EvL1GrowWriteTable)
	const piece = 1 << 20 / 8 // entries
	b := make([]byte, 0, min(n, piece)*8)
	for first := int64(0); first < n; first += piece {
		if err := ended(r); err != nil {
			return err
		}
		b = l1.append(b[:0], first, min(first+piece, n))
		if err := s.writeMeta(r, b, off+8*first, 0); err != nil {
			return err
		}
	}
	return s.barrier(r)
}
