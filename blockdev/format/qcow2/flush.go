package qcow2

import (
	"sort"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Flush brings all completed writes and the metadata that find them to stable storage.
func (s *image) Flush(r *blk.Req) error {
	if !s.lock(r) {
		return blk.ErrWouldBlock
	}
	defer s.mu.Unlock()
	if s.readOnly {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return s.flush(r)
}

// flushDead is Flush of an image that was given up. What was acknowledged is there if nothing was to be written any more but guest data.
func (s *image) flushDead(r *blk.Req) error {
	lost := s.midFlush || s.l2.ndirty > 0 || len(s.l1Dirty) > 0 || len(s.reftDirty) > 0 || !s.lazy() && s.rb.ndirty > 0
	if err := s.file.Flush(r); err != nil {
		return err
	}
	if lost {
		return errIO
	}
	return nil
}

// flush is Flush with mu held; it is dropped in between. Callers that come while a flush
// runs share the next one.
func (s *image) flush(r *blk.Req) error {
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
	// Who waits comes before the node hears of a panic, and what was taken to be written is in no list any more.
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

func (s *image) endFlush() {
	s.flushing = false
	s.done.Broadcast()
}

// claimFlush waits until no flush runs and keeps others from starting: L1 and header then
// hold still. mu is held, and dropped while waiting; release undoes it.
func (s *image) claimFlush() (release func()) {
	for s.flushing {
		s.done.Wait()
	}
	s.flushing = true
	return s.endFlush
}

// image of a piece of metadata as it is to be written.
type copied struct {
	off  int64
	data []byte
	t    *table // of an L2 slice; nil for L1
	gen  uint64
	l1   int64 // group of L1 entries
}

// flushOnce writes everything in the order of the package doc; flushing is set.
func (s *image) flushOnce(r *blk.Req) error {
	if !s.lazy() {
		if err := s.writeRefcounts(r); err != nil {
			return err
		}
	}
	l2, l1 := s.takeL2(), s.takeL1()
	frees := s.pending
	s.pending, s.pendBytes = nil, 0
	upTo := s.wrote
	due := s.synced != upTo
	err := s.checkCopies(r, l2, l1)
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
		s.pending = append(frees, s.pending...)
		for _, f := range frees {
			s.pendBytes += f.n
		}
		return err
	}
	s.synced = max(s.synced, upTo)
	s.limbo = append(s.limbo, frees...)
	s.reap(r, false)
	return nil
}

// takeL2 copies the dirty L2 slices and pins them.
func (s *image) takeL2() []copied {
	if s.l2.ndirty == 0 {
		return nil
	}
	out := make([]copied, 0, s.l2.ndirty)
	all := make([]byte, 0, s.l2.ndirty*s.l2.size)
	for t := s.l2.lru.next; t != &s.l2.lru; t = t.next {
		if t.dirty {
			t.pins++
			n := len(all)
			all = append(all, t.data...)
			out = append(out, copied{off: t.off, data: all[n:len(all):len(all)], t: t, gen: t.gen})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].off < out[j].off })
	return out
}

// takeL1 copies the dirty groups of L1 entries.
func (s *image) takeL1() []copied {
	var out []copied
	for k := range s.l1Dirty {
		out = append(out, copied{
			off:  int64(s.hdr.L1TableOffset) + k*512,
			data: s.encodeEntries(s.l1At, k, int64(s.hdr.L1Size)),
			l1:   k,
		})
	}
	clear(s.l1Dirty)
	return out
}

func (s *image) checkCopies(r *blk.Req, l2, l1 []copied) error {
	for _, c := range l2 {
		if err := s.checkOverlap(r, c.off, int64(len(c.data)), olActiveL2); err != nil {
			return err
		}
		if err := s.checkOwner(r, c.off, int64(len(c.data))); err != nil {
			return err
		}
		s.noteEnd(c.off + int64(len(c.data)))
	}
	for _, c := range l1 {
		if err := s.checkOverlap(r, c.off, int64(len(c.data)), olActiveL1); err != nil {
			return err
		}
		if err := s.checkOwner(r, c.off, int64(len(c.data))); err != nil {
			return err
		}
	}
	return nil
}

// writeCopies runs without mu.
func (s *image) writeCopies(r *blk.Req, l2, l1 []copied, due bool) error {
	if due && len(l2)+len(l1) > 0 {
		if err := s.file.Flush(r); err != nil {
			return err
		}
	}
	for i := 0; i < len(l2); {
		// Neighbouring slices were copied side by side unless the cache's order differed.
		j, bufs := i+1, [][]byte{l2[i].data}
		for j < len(l2) && l2[j].off == l2[j-1].off+int64(len(l2[j-1].data)) {
			bufs = append(bufs, l2[j].data)
			j++
		}
		s.step(r, blk.EvL2Update)
		if err := s.file.WriteAt(r, blk.Bufs(bufs), l2[i].off, 0); err != nil {
			return err
		}
		i = j
	}
	if len(l1) > 0 {
		if err := s.file.Flush(r); err != nil {
			return err
		}
		for _, c := range l1 {
			s.step(r, blk.EvL1Update)
			if err := s.file.WriteAt(r, blk.Buf(c.data), c.off, 0); err != nil {
				return err
			}
		}
	}
	return s.file.Flush(r)
}

// room makes a flush when it is due: too much waits to be freed, or the L2 cache holds hardly
// anything but changes and will have to give something up. It is called with mu held before anything was looked up,
// and drops it. It fails if the image was given up meanwhile.
func (s *image) room(r *blk.Req) error {
	if s.pendBytes >= maxPending || s.l2.full() && s.l2.ndirty >= s.l2.max-s.l2.max/4 && !s.allFits() {
		if r.NoWait {
			return blk.ErrWouldBlock
		}
		err := s.flush(r)
		if s.dead.Load() {
			return s.usable()
		}
		return err
	}
	if len(s.limbo) > 0 && !r.NoWait {
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

// allFits tells whether the L2 cache has place for the slices of the whole disk, as it does by default up to 256 GiB
// with clusters of 64 KiB: then nothing has to go for another, however much of it is changed.
func (s *image) allFits() bool {
	const entrySize = 8
	return int64(s.l2.max)*s.slice/entrySize >= s.geo.Clusters(s.size.Load())
}

// lazy tells whether refcounts need not be kept accurate on disk.
func (s *image) lazy() bool {
	return s.set.lazy && s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0
}

// markDirty sets the dirty bit before the first change under lazy refcounts. mu is held.
func (s *image) markDirty(r *blk.Req) error {
	if !s.set.lazy || s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0 {
		return nil
	}
	return s.writeIncompat(r, s.hdr.IncompatibleFeatures|layout.IncompatDirty)
}

// writeIncompat changes the incompatible feature bits on disk and then in memory.
func (s *image) writeIncompat(r *blk.Req, v uint64) error {
	var b [8]byte
	be.PutUint64(b[:], v)
	if err := s.enter(r, b[:], layout.OffIncompatFeatures); err != nil {
		return err
	}
	s.hdr.IncompatibleFeatures = v
	s.publish()
	return nil
}

// markClean writes accurate refcounts and clears the dirty bit. All is flushed; mu is held.
func (s *image) markClean(r *blk.Req) error {
	if err := s.writeRefcounts(r); err != nil {
		return err
	}
	if err := s.barrier(r); err != nil {
		return err
	}
	if s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
		return nil
	}
	return s.writeIncompat(r, s.hdr.IncompatibleFeatures&^layout.IncompatDirty)
}

// Inactivate writes everything down: afterwards the image on disk is clean. Called while no
// requests run.
func (s *image) Inactivate(r *blk.Req) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly || s.dead.Load() || s.closed {
		return nil
	}
	if err := s.flush(r); err != nil {
		return err
	}
	// Bitmaps that cannot be stored have missed writes, as the image says already; the guest's data come first.
	bitmaps := s.orGiveOut(r, func() error { return s.storeBitmaps(r) })
	if err := s.flush(r); err != nil {
		return err
	}
	s.reap(r, true)
	if s.flagsDue {
		if _, err := s.fixFlags(r, 0); err != nil {
			return err
		}
		if err := s.flush(r); err != nil {
			return err
		}
		s.flagsDue = false
	}
	s.fillEnd(r)
	if err := s.markClean(r); err != nil {
		return err
	}
	if bitmaps != nil {
		return wrap("Could not store persistent bitmaps", bitmaps)
	}
	return nil
}

// fillEnd makes the file end with its last cluster: programs differ in what they make of one that is there in part.
func (s *image) fillEnd(r *blk.Req) {
	if s.file.Size() >= s.dataEnd {
		return
	}
	if last, err := s.lastCluster(r); err != nil || (last+1)<<s.cb != s.dataEnd {
		return // it was given back meanwhile
	}
	s.wrote++
	if err := s.file.Resize(ctxOf(r), s.dataEnd, false, blk.PreallocOff); err != nil {
		s.warnf("The file ends inside of a cluster: %s", blk.ErrnoText(err))
	}
}

// Close ends the image after Inactivate; errors of that were the caller's to report.
func (s *image) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly && !s.closed {
		s.tellLost()
	}
	s.closed = true
	if s.stopClean != nil {
		s.stopClean()
		s.stopClean = nil
	}
	s.l2, s.rb = newCache(int(s.slice), 1), newCache(int(s.cs), 1)
	s.unz = unzipped{}
	// Whoever still knows the node does not keep what it held.
	s.l1, s.owners, s.inactive = entries{}, map[int64]owner{}, nil
	return nil
}
