package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// discarder does zeroes and discards of the guest disk. Its exported methods take mu, the others
// need it.
type discarder struct {
	bitmaps

	inflight inflight // +checklocks:mu
}

// Zero makes [off, off+n) read as zeroes by changing L2 entries. It fails with ErrNotSupported, and
// the caller has to write, for a part of a cluster whose rest does not read as zeroes, and in
// images of version 2, which can only have no cluster there, if anything lies below or may do so
// later.
func (s *discarder) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return s.retry(r, func() error { return s.zero(r, off, n, f) })
}

func (s *discarder) zero(r *blk.Req, off, n int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	if err := s.mark(r, off, n, f); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if s.raw {
		return s.zeroRaw(r, off, n, f)
	}
	v2 := s.version < 3
	if v2 && (s.back() != nil || s.backLater()) {
		// Also beyond the end of the backing file, which may be replaced by a longer one.
		return blk.ErrNotSupported
	}
	end := off + n
	if end == s.size.Load() {
		end = s.geo.RoundUp(end)
	}
	if s.geo.Extended {
		return s.zeroSubs(r, off, end, f&blk.MayUnmap != 0)
	}
	partial := off&(s.cs-1) != 0 || end&(s.cs-1) != 0
	if partial {
		if off>>s.cb != (end-1)>>s.cb {
			return blk.ErrNotSupported
		}
		ok, err := s.restIsZero(r, off, end)
		if err != nil {
			return err
		}
		if !ok {
			return blk.ErrNotSupported
		}
		off, end = s.geo.RoundDown(off), s.geo.RoundUp(end)
	}
	if v2 && !partial {
		return s.discard(r, off>>s.cb, end>>s.cb, false, false, discardRequest)
	}
	w := sliceWalk{gc: off >> s.cb, to: end >> s.cb, create: !v2}
	if !partial {
		return s.zeroClusters(r, &w, f&blk.MayUnmap != 0)
	}
	t, err := s.nextSlice(r, &w)
	if t == nil || err != nil {
		return err
	}
	i := s.l2Index(w.gc)
	if !s.readsZero(s.geo.KindOf(s.entry(t, i)), w.gc) {
		return blk.ErrNotSupported // written since it was looked at
	}
	if v2 {
		return nil // it has no cluster, and needs none
	}
	return s.zeroEntry(r, t, i, f&blk.MayUnmap != 0)
}

// zeroRaw is Zero where the data file shows the disk by itself: it gets the zeroes, and the entries
// stay as they are. All clusters are in it, or read as zeroes, unless there is a backing file,
// which such an image should not have.
// +checklocks:s.mu
func (s *discarder) zeroRaw(r *blk.Req, off, n int64, f blk.Flags) (err error) {
	if s.back() != nil || s.backLater() {
		return blk.ErrNotSupported
	}
	s.unlocked(func() { err = s.external.Zero(r, off, n, f) })
	return err
}

// zeroClusters makes the clusters that w goes over read as zeroes.
// +checklocks:s.mu
func (s *discarder) zeroClusters(r *blk.Req, w *sliceWalk, unmap bool) error {
	for {
		t, err := s.nextSlice(r, w)
		if t == nil || err != nil {
			return err
		}
		var gone []span
		for j := range w.k {
			old := s.entry(t, s.l2Index(w.gc)+j)
			if err := s.zeroEntry(r, t, s.l2Index(w.gc)+j, unmap); err != nil {
				return err
			}
			if unmap && !s.set.noUnref {
				gone = s.gone(gone, w.gc+j, old, discardRequest)
			}
		}
		s.punchNow(r, w, gone)
	}
}

// zeroEntry makes one cluster read as zeroes, keeping its host cluster unless it may go.
// +checklocks:s.mu
func (s *discarder) zeroEntry(r *blk.Req, t *table, i int64, unmap bool) error {
	old := s.cell(t, i)
	unmap = unmap && !s.set.noUnref
	drop := unmap && s.geo.KindOf(old.word).HasHost() || s.geo.KindOf(old.word) == layout.CompressedKind
	v := s.zeroed(0)
	if !drop {
		v = s.zeroed(old.word)
	}
	if v == old {
		return nil
	}
	if drop {
		if err := s.canFree(r, old.word); err != nil {
			return err
		}
	}
	s.setCell(t, i, v)
	if drop {
		s.freeEntry(r, old.word, discardRequest)
	}
	return nil
}

// restIsZero tells whether the cluster around [off, end) reads as zeroes outside of it.
// +checklocks:s.mu
func (s *discarder) restIsZero(r *blk.Req, off, end int64) (bool, error) {
	gc := off >> s.cb
	if s.waitInflight(gc, 1) {
		if err := s.usable(); err != nil {
			return false, err
		}
	}
	m, err := s.lookup(r, gc<<s.cb, s.cs)
	if err != nil {
		return false, err
	}
	return s.readsZero(m.kind, gc), nil
}

// readsZero tells whether guest cluster gc, whose L2 entry is of kind k, surely reads as zeroes.
func (s *discarder) readsZero(k layout.Kind, gc int64) bool {
	return k == layout.ZeroPlain || k == layout.ZeroAlloc || k == layout.Unallocated && s.backSize() <= gc<<s.cb
}

const (
	// turnEntries is how many entries nextSlice does before it lets others have the lock; a slice
	// counts as sliceCost of them.
	turnEntries = 16 << 10
	sliceCost   = 256
	// maxDirty is the number of changed slices from which on it flushes.
	maxDirty = 4096
)

// sliceWalk goes over guest clusters in parts that one L2 slice maps.
type sliceWalk struct {
	gc, to int64 // what is left, the current part included
	create bool  // parts without an L2 table get one; otherwise they are skipped
	k      int64 // clusters of the current part
	did    int64 // how much was done since others had the lock
}

// nextSlice returns the slice of the next part, ready to be changed and with no allocation in
// flight there, or nil behind the last one. It drops mu in between, and ends when the client has
// gone.
// +checklocks:s.mu
func (s *discarder) nextSlice(r *blk.Req, w *sliceWalk) (*table, error) {
	if w.k > 0 {
		w.gc, w.did = w.gc+w.k, w.did+w.k+sliceCost
	}
	for w.gc < w.to {
		if w.did >= turnEntries {
			w.did = 0
			if err := s.letOthers(r); err != nil {
				return nil, err
			}
		}
		if err := s.room(r); err != nil {
			return nil, err
		}
		w.k = min(w.to-w.gc, s.sliceLeft(w.gc))
		if s.waitInflight(w.gc, w.k) {
			if err := s.usable(); err != nil {
				return nil, err
			}
			continue
		}
		if li := w.gc >> s.geo.L2Bits(); !w.create && s.l1.at(li)&layout.OffsetMask == 0 {
			w.gc = s.nextL1(li + 1) // the entry itself may have flags
			continue
		}
		if err := s.setDirtyBit(r); err != nil {
			return nil, err
		}
		return s.sliceForWrite(r, w.gc)
	}
	return nil, nil
}

// letOthers lets others have mu in the middle of something long.
// +checklocks:s.mu
func (s *flusher) letOthers(r *blk.Req) error {
	if err := ended(r); err != nil {
		return err
	}
	if s.l2.ndirty >= maxDirty {
		// A flush copies and checks what is dirty with mu held.
		if err := s.flush(r); err != nil {
			return err
		}
	}
	s.mu.Unlock() // who has waited for a while gets it
	s.mu.Lock()
	return s.usable()
}

// Discard frees the clusters within [off, off+n). They read as zeroes afterwards or, in images of
// version 2, which must not have or name a backing file, become unallocated.
func (s *discarder) Discard(r *blk.Req, off, n int64) error {
	return s.retry(r, func() error { return s.discardAt(r, off, n) })
}

func (s *discarder) discardAt(r *blk.Req, off, n int64) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	if err := s.mark(r, off, n, 0); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	hasBacking := s.back() != nil || s.backLater()
	if s.version < 3 && hasBacking {
		return blk.ErrNotSupported
	}
	end := off + n
	if end == s.size.Load() {
		end = s.geo.RoundUp(end)
	}
	from, to := s.geo.Clusters(off), end>>s.cb
	if from >= to {
		return nil
	}
	if s.raw {
		return s.discardRaw(r, from<<s.cb, min(to<<s.cb, s.size.Load()))
	}
	return s.discard(r, from, to, hasBacking, false, discardRequest)
}

// discardRaw is Discard where the data file shows the disk by itself. What was discarded reads the
// same in either way, so it is made zeroes, if that takes no writing.
// +checklocks:s.mu
func (s *discarder) discardRaw(r *blk.Req, off, end int64) (err error) {
	f := blk.NoFallback
	if s.set.discard[discardRequest] {
		f |= blk.MayUnmap
	}
	if err = s.zeroRaw(r, off, end-off, f); unsupported(err) {
		return nil
	}
	return err
}

// discard frees guest clusters [from, to); full leaves them unallocated.
// +checklocks:s.mu
func (s *discarder) discard(r *blk.Req, from, to int64, hasBacking, full bool, kind discardKind) error {
	w := sliceWalk{gc: from, to: to, create: hasBacking && !full}
	for {
		t, err := s.nextSlice(r, &w)
		if t == nil || err != nil {
			return err
		}
		if err := s.discardSlice(r, t, &w, hasBacking, full, kind); err != nil {
			return err
		}
	}
}

// discardSlice is discard for the current part of w.
// +checklocks:s.mu
func (s *discarder) discardSlice(r *blk.Req, t *table, w *sliceWalk, hasBacking, full bool, kind discardKind) error {
	keep := s.set.noUnref && !full && kind == discardRequest
	var kept []span
	defer func() { s.punchNow(r, w, kept) }()
	for i := s.l2Index(w.gc); i < s.l2Index(w.gc)+w.k; i++ {
		was := s.cell(t, i)
		old, v := was.word, was
		switch {
		case full:
			v = cell{}
		case keep && (s.geo.KindOf(old) == layout.Normal || s.geo.KindOf(old) == layout.ZeroAlloc):
			if v = s.zeroed(old); v != was {
				s.setCell(t, i, v)
				kept = s.keep(r, kept, old, kind)
			}
			continue
		case hasBacking || s.geo.KindOf(old).HasHost():
			v = cell{}
			if s.version >= 3 {
				v = s.zeroed(0)
			}
		}
		if v == was {
			continue
		}
		if err := s.canFree(r, old); err != nil {
			return err
		}
		s.setCell(t, i, v)
		s.freeEntry(r, old, kind)
		kept = s.gone(kept, w.gc+i-s.l2Index(w.gc), old, kind)
	}
	return nil
}

// punchNow punches clusters of the disk's data that keep their places: those of the current part of
// w. mu is dropped meanwhile. Writes to that part would use the places, so they wait; and if others
// free them they stay in quarantine.
// +checklocks:s.mu
func (s *discarder) punchNow(r *blk.Req, w *sliceWalk, l []span) {
	if len(l) == 0 {
		return
	}
	a, e := &alloc{first: w.gc, n: w.k, reuse: true}, s.quarantine.hold()
	s.inflight = append(s.inflight, a)
	defer s.endAlloc(a)
	defer e.Release()
	s.unlocked(func() {
		for _, x := range l {
			if end := min(x.end, s.data().Size()); x.off < end {
				_ = s.data().Discard(r, x.off, end-x.off) // failing to give space back harms nobody
			}
		}
	})
}

// gone adds guest cluster gc, to which e referred, to what is to be punched in another file. Those
// that are encrypted are not: until the entry is on disk they have to read as before, or as zeroes.
// +checklocks:s.mu
func (s *surveyor) gone(list []span, gc int64, e uint64, kind discardKind) []span {
	if !s.geo.External || s.seal != nil || !s.set.discard[kind] || !s.geo.KindOf(e).HasHost() {
		return list
	}
	return with(list, span{gc << s.cb, (gc + 1) << s.cb})
}

// keep adds the host cluster of e, which keeps its place (discard-no-unref), to what is to be
// punched, unless a snapshot shares it, or it is encrypted.
// +checklocks:s.mu
func (s *surveyor) keep(r *blk.Req, list []span, e uint64, kind discardKind) []span {
	off := int64(e & layout.OffsetMask)
	if !s.set.discard[kind] || s.seal != nil || off&(s.cs-1) != 0 || off+s.cs > s.data().Size() || e&layout.Copied == 0 {
		return list
	}
	if s.geo.External {
		return with(list, span{off, off + s.cs})
	}
	if n, err := s.refcount(r, off>>s.cb); err != nil || n != 1 || s.wrong.at(off>>s.cb) || s.surveying() {
		return list
	}
	return with(list, span{off, off + s.cs})
}
