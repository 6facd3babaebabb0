package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Images with extended L2 entries. What is written allocates the subclusters that it touches: only
// of the first and the last of these is the rest copied, and of those that have data in a host
// cluster that has to be left, because it is shared or compressed. The others stay as they are:
// unallocated, or zeroes.

// cell is an L2 entry, with its bitmap of subclusters if it is an extended one.
type cell struct{ word, bits uint64 }

// +checklocks:s.mu
func (s *tables) cell(t *table, i int64) cell {
	c := cell{word: s.entry(t, i)}
	if s.geo.Extended {
		c.bits = be.Uint64(t.data[i<<s.eb+8:])
	}
	return c
}

// +checklocks:s.mu
func (s *tables) setCell(t *table, i int64, c cell) {
	s.setEntry(t, i, c.word)
	if s.geo.Extended {
		be.PutUint64(t.data[i<<s.eb+8:], c.bits)
	}
}

// zeroed is a cluster that reads as zeroes and has the host cluster of e, if it has one.
func (s *tables) zeroed(e uint64) cell {
	if s.geo.Extended {
		return cell{e, layout.AllZero}
	}
	return cell{word: e | layout.ZeroFlag}
}

// lookupSubs is lookup in slice t, from in of guest cluster gc on.
// +checklocks:s.mu
func (s *tables) lookupSubs(r *blk.Req, t *table, gc, in, n int64) (mapping, error) {
	i := s.l2Index(gc)
	c := s.cell(t, i)
	m := mapping{kind: s.geo.SubKind(c.word, c.bits, in>>s.sb), entry: c.word}
	if err := s.checkEntry(r, m.kind, c.word, gc); err != nil {
		return mapping{}, err
	}
	if m.kind == layout.CompressedKind {
		m.n = min(n, s.cs-in)
		return m, nil
	}
	host := int64(c.word & layout.OffsetMask)
	if m.kind.HasHost() {
		m.host = host + in
	}
	at := (in>>s.sb + 1) << s.sb
	for at < in+n {
		if at&(s.cs-1) == 0 {
			c = s.cell(t, i+at>>s.cb)
			if m.kind.HasHost() && int64(c.word&layout.OffsetMask) != host+at {
				break
			}
		}
		if s.geo.SubKind(c.word, c.bits, at&(s.cs-1)>>s.sb) != m.kind {
			break
		}
		if at&(s.cs-1) == 0 && (c.bits == 0 || c.bits == layout.AllAlloc || c.bits == layout.AllZero) {
			at += s.cs
		} else {
			at += 1 << s.sb
		}
	}
	m.n = min(n, at-in)
	return m, nil
}

// planSubs is planWrite in slice t, which may be nil.
// +checklocks:s.mu
func (s *requests) planSubs(r *blk.Req, t *table, gc, k, in, n int64) (plan, error) {
	if t != nil {
		if run := s.writtenRun(t, s.l2Index(gc), k, in, n); run > 0 {
			return s.planInPlace(r, t, gc, run, in, n)
		}
	}
	if r.NoWait {
		return plan{}, blk.ErrWouldBlock
	}
	if err := s.setDirtyBit(r); err != nil {
		return plan{}, err
	}
	t, err := s.sliceForWrite(r, gc)
	if err != nil {
		return plan{}, err
	}
	a := &alloc{first: gc}
	i := s.l2Index(gc)
	if err := s.placeSubs(r, t, a, k); err != nil {
		return plan{}, err
	}
	off := gc<<s.cb + in
	p := plan{n: min(n, a.n<<s.cb-in), host: a.host + in, alloc: a}
	first, last := s.cell(t, i), s.cell(t, i+a.n-1)
	p.head, p.tail = first, last
	p.from = gc<<s.cb + s.copyStart(first, in, a.reuse)
	end, at := off+p.n, (gc+a.n-1)<<s.cb
	p.to = at + s.copyEnd(last, end-at, a.reuse)
	if s.geo.External {
		p.to = max(min(p.to, s.size.Load()), end)
	} else if err := s.checkOverlap(r, a.host, a.n<<s.cb, 0); err != nil {
		s.abort(r, a)
		return plan{}, err
	}
	a.from, a.to = p.from, p.to
	s.inflight = append(s.inflight, a)
	return p, nil
}

// writtenRun is how many clusters from entry i of t on, k at most, have all subclusters of their
// own that n bytes from in on touch.
// +checklocks:s.mu
func (s *requests) writtenRun(t *table, i, k, in, n int64) (run int64) {
	for ; run < k; run++ {
		from, to := max(in-run<<s.cb, 0), min(in+n-run<<s.cb, s.cs)
		c := s.cell(t, i+run)
		mask := s.geo.SubMask(from, to)
		if c.word&layout.Copied == 0 || s.geo.KindOf(c.word) != layout.Normal || c.bits&mask != mask ||
			!s.geo.Possible(c.word, c.bits) {
			break
		}
	}
	return run
}

// placeSubs finds the host clusters of a, which is for up to k clusters.
// +checklocks:s.mu
func (s *requests) placeSubs(r *blk.Req, t *table, a *alloc, k int64) error {
	i := s.l2Index(a.first)
	first := s.entry(t, i)
	run := int64(0)
	for ; run < k; run++ {
		c := s.cell(t, i+run)
		kind := s.geo.KindOf(c.word)
		if !s.geo.Possible(c.word, c.bits) {
			kind = layout.Invalid
		}
		if err := s.checkEntry(r, kind, c.word, a.first+run); err != nil {
			return err
		}
		if s.geo.External {
			continue
		}
		if s.owned(first) {
			if c.word != first+uint64(run<<s.cb) {
				break
			}
			continue
		}
		if run > 0 && s.owned(c.word) {
			break
		}
		if err := s.canFree(r, c.word); err != nil {
			return err
		}
	}
	switch {
	case s.geo.External:
		a.reuse, a.host, a.n = true, a.first<<s.cb, run
		a.fresh = s.unwritten(a.host, s.data().Size())
		return nil
	case s.owned(first):
		a.reuse, a.host, a.n = true, int64(first&layout.OffsetMask), run
		return s.checkOwner(r, a.host, a.n<<s.cb)
	}
	return s.newHost(r, t, a, run)
}

// owned tells whether an extended entry has a host cluster of its own.
func (s *tables) owned(e uint64) bool {
	return e&layout.Copied != 0 && s.geo.KindOf(e) == layout.Normal
}

// newHost allocates up to n host clusters for a, whose entries are in t.
// +checklocks:s.mu
func (s *requests) newHost(r *blk.Req, t *table, a *alloc, n int64) error {
	t.pins++ // allocating may need other tables
	end := s.fileEnd
	c, got, err := s.allocate(r, 1, n, "data cluster")
	t.pins--
	if err != nil {
		return err
	}
	a.host, a.n = c<<s.cb, got
	a.fresh = s.unwritten(a.host, end)
	s.noteEnd(a.host + got<<s.cb)
	s.dataEnd = max(s.dataEnd, a.host+got<<s.cb)
	return nil
}

// copyStart is where in a cluster that is written from in on writing has to begin. Who stays in the
// host cluster leaves what is there alone, as others may be writing to it.
func (s *tables) copyStart(c cell, in int64, stays bool) int64 {
	i := in >> s.sb
	if stays {
		if s.geo.SubKind(c.word, c.bits, i) == layout.Normal {
			return in
		}
		return i << s.sb
	}
	for k := range i {
		if x := s.geo.SubKind(c.word, c.bits, k); x == layout.Normal || x == layout.CompressedKind {
			return k << s.sb
		}
	}
	return i << s.sb
}

// copyEnd is where in a cluster that is written up to end writing has to end.
func (s *tables) copyEnd(c cell, end int64, stays bool) int64 {
	i := (end - 1) >> s.sb
	if stays {
		if s.geo.SubKind(c.word, c.bits, i) == layout.Normal {
			return end
		}
		return (i + 1) << s.sb
	}
	for k := int64(layout.Subclusters) - 1; k > i; k-- {
		if x := s.geo.SubKind(c.word, c.bits, k); x == layout.Normal || x == layout.CompressedKind {
			return (k + 1) << s.sb
		}
	}
	return (i + 1) << s.sb
}

// linkSubs makes the entries from i of t on refer to the clusters of a, and to what was written to
// them.
// +checklocks:s.mu
func (s *requests) linkSubs(r *blk.Req, t *table, i int64, a *alloc) {
	for k := range a.n {
		old := s.cell(t, i+k)
		at := (a.first + k) << s.cb
		mask := s.geo.SubMask(max(a.from-at, 0), min(a.to-at, s.cs))
		c := cell{uint64(a.host+k<<s.cb) | layout.Copied, old.bits&^(mask|mask<<layout.Subclusters) | mask}
		s.setCell(t, i+k, c)
		if !a.reuse {
			s.freeEntry(r, old.word, discardNever)
		}
	}
}

// readOldSubs is readOld where subclusters may differ.
func (s *requests) readOldSubs(r *blk.Req, c cell, gc, in int64, b []byte) error {
	for len(b) > 0 {
		kind := s.geo.SubKind(c.word, c.bits, in>>s.sb)
		end := (in>>s.sb + 1) << s.sb
		for end < in+int64(len(b)) && s.geo.SubKind(c.word, c.bits, end>>s.sb) == kind {
			end += 1 << s.sb
		}
		n := min(int64(len(b)), end-in)
		if err := s.readOldRun(r, kind, c.word, gc<<s.cb+in, in, b[:n]); err != nil {
			return err
		}
		b, in = b[n:], in+n
	}
	return nil
}

// zeroSubs makes [off, end) read as zeroes. What is less than a subcluster must be in one whose
// rest reads as zeroes.
// +checklocks:s.mu
func (s *discarder) zeroSubs(r *blk.Req, off, end int64, unmap bool) error {
	size := int64(1) << s.sb
	partial := off&(size-1) != 0 || end&(size-1) != 0
	if partial && off>>s.sb != (end-1)>>s.sb {
		return blk.ErrNotSupported
	}
	w := sliceWalk{gc: off >> s.cb, to: s.geo.Clusters(end), create: true}
	for {
		t, err := s.nextSlice(r, &w)
		if t == nil || err != nil {
			return err
		}
		var gone []span
		for gc := w.gc; gc < w.gc+w.k; gc++ {
			at, i := gc<<s.cb, s.l2Index(gc)
			from, to := max(off-at, 0), min(end-at, s.cs)
			old := s.cell(t, i)
			if from == 0 && to == s.cs {
				if err := s.zeroEntry(r, t, i, unmap); err != nil {
					return err
				}
				if unmap && !s.set.noUnref {
					gone = s.gone(gone, gc, old.word, discardRequest)
				}
				continue
			}
			kind := s.geo.SubKind(old.word, old.bits, from>>s.sb)
			if kind == layout.CompressedKind || partial && !s.subReadsZero(kind, at+from&^(size-1)) {
				return blk.ErrNotSupported
			}
			mask := s.geo.SubMask(from, to)
			v := cell{old.word, old.bits&^mask | mask<<layout.Subclusters}
			if v != old {
				s.setCell(t, i, v)
			}
		}
		s.punchNow(r, &w, gone)
	}
}

// subReadsZero tells whether the subcluster at off, of kind k, surely reads as zeroes.
func (s *discarder) subReadsZero(k layout.Kind, off int64) bool {
	return k == layout.ZeroPlain || k == layout.ZeroAlloc || k == layout.Unallocated && s.backSize() <= off
}
