package qcow2

import (
	"cmp"
	"fmt"
	"sort"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Everything in this file needs mu.

// reftAt is entry b of the refcount table; zero where the table ends.
func (s *image) reftAt(b int64) uint64 {
	if b < int64(len(s.reft)) {
		return s.reft[b]
	}
	return 0
}

func (s *image) setReft(b int64, v uint64) {
	for int64(len(s.reft)) <= b {
		s.reft = append(s.reft, 0)
	}
	s.reft[b] = v
	s.reftDirty[b>>6] = struct{}{}
}

// refblock returns refcount block b, nil if there is none.
func (s *image) refblock(r *blk.Req, b int64) (*table, error) {
	off := int64(s.reftAt(b) & layout.ReftMask)
	if off == 0 {
		return nil, nil
	}
	if t := s.rb.get(off); t != nil {
		return t, nil
	}
	if off&(s.cs-1) != 0 || off < 0 {
		return nil, s.corrupt(r, true, -1, -1, fmt.Sprintf("Refblock offset %s unaligned (reftable index: %s)", hex(uint64(off)), hex(uint64(b))))
	}
	if off >= max(s.file.Size(), s.fileEnd) {
		return nil, s.corrupt(r, true, -1, -1, fmt.Sprintf("Refblock offset %s beyond the end of the file (reftable index: %s)", hex(uint64(off)), hex(uint64(b))))
	}
	if err := s.roomForBlock(r); err != nil {
		return nil, err
	}
	s.step(r, blk.EvRefblockLoad)
	t := s.rb.alloc(off)
	if err := s.readFile(r, blk.Buf(t.data), off); err != nil {
		return nil, err
	}
	s.rb.insert(t)
	return t, nil
}

// roomForBlock evicts a refcount block if the cache is full. Refcounts on disk may be newer
// than the rest at any time (package doc), so this needs no barrier.
func (s *image) roomForBlock(r *blk.Req) error {
	if !s.rb.full() {
		return nil
	}
	t := s.rb.victim(func(*table) bool { return true })
	if t == nil {
		return nil
	}
	if t.dirty {
		if err := s.writeMeta(r, t.data, t.off, olRefcountBlock); err != nil {
			return err
		}
	}
	s.rb.drop(t)
	return nil
}

// refcount returns the refcount of cluster c.
func (s *image) refcount(r *blk.Req, c int64) (uint64, error) {
	bits := s.geo.RefblockBits()
	t, err := s.refblock(r, c>>bits)
	if t == nil || err != nil {
		return 0, err
	}
	return s.geo.Refcount(t.data, c&(1<<bits-1)), nil
}

// addRef changes the refcount of cluster c by d, which is 1 or -1. The refcount block must
// exist for +1, see ensureBlock.
func (s *image) addRef(r *blk.Req, c int64, d int) error {
	bits := s.geo.RefblockBits()
	t, err := s.refblock(r, c>>bits)
	if err != nil {
		return err
	}
	if t == nil {
		return errInval
	}
	if err := s.checkOwner(r, t.off, s.cs); err != nil {
		return err
	}
	i := c & (1<<bits - 1)
	v := s.geo.Refcount(t.data, i)
	switch {
	case d < 0 && v == 0, d > 0 && v == s.geo.RefcountMax():
		return errInval
	case d < 0:
		v--
	default:
		v++
	}
	s.geo.SetRefcount(t.data, i, v)
	s.rb.markDirty(t)
	if v == 0 {
		s.freeAgain(c)
		if s.freeByte>>s.cb == c {
			s.freeByte = 0
		}
	}
	return nil
}

// mostSearched is how many clusters are looked at for a free one, in the file and again behind its end. Tables can count 2^40 clusters and more as used.
var mostSearched int64 = 1 << 24

// findFree returns the first run of free clusters at or after from: at least need clusters, at most want; next is from where the next search is to begin. What
// is free in the file may be passed over if much has to be looked at: the next search goes on there.
func (s *image) findFree(r *blk.Req, from, need, want int64) (first, n, next int64, err error) {
	bits := s.geo.RefblockBits()
	limit := int64(1) << (layout.MaxHostBits - s.cb)
	end := s.geo.Clusters(max(s.file.Size(), s.fileEnd))
	first = from
	skipped := int64(-1) // from here to the end of the file
search:
	for c, left := from, mostSearched; n < want; {
		switch {
		case c >= limit, left <= 0 && c >= end:
			return 0, 0, 0, errTooBig
		case left <= 0:
			skipped = c
			c, first, n, left = end, end, 0, mostSearched
		}
		if err := ended(r); err != nil {
			return 0, 0, 0, err
		}
		b := c >> bits
		last := (b + 1) << bits
		t, err := s.refblock(r, b)
		if err != nil {
			return 0, 0, 0, err
		}
		for ; c < last && n < want; c++ {
			if (t == nil || s.geo.Refcount(t.data, c&(1<<bits-1)) == 0) && !s.taken(c) {
				n++
				continue
			}
			left--
			if n >= need && n > 0 {
				break search
			}
			first, n = c+1, 0
		}
	}
	if skipped >= 0 {
		return first, n, skipped, nil
	}
	return first, n, first + n, nil
}

// allocate takes a run of at least need and at most want free clusters and gives each
// refcount 1. It returns the first cluster; what names it if that is impossible.
func (s *image) allocate(r *blk.Req, need, want int64, what string) (first, n int64, err error) {
	if err := s.markDirty(r); err != nil {
		return 0, 0, err
	}
	if v := s.survey; v != nil && v.c == nil {
		if err := s.vet(r); err != nil {
			return 0, 0, err
		}
	}
	s.step(r, blk.EvClusterAlloc)
	var next int64
	for {
		first, n, next, err = s.findFree(r, s.lowest(), need, want)
		if err != nil {
			return 0, 0, err
		}
		again, err := s.coverRun(r, first, n)
		if err != nil {
			return 0, 0, err
		}
		if !again {
			break
		}
	}
	if first == 0 {
		return 0, 0, s.corrupt(r, true, -1, -1, "Preventing invalid allocation of "+what+" at offset 0")
	}
	for i := range n {
		if err := s.addRef(r, first+i, 1); err != nil {
			s.unref(r, freed{off: first << s.cb, n: i << s.cb})
			return 0, 0, err
		}
	}
	if need == 1 || first == s.lowest() {
		s.setLowest(next)
	}
	return first, n, nil
}

// allocateAt takes n clusters from first, which must all be free.
func (s *image) allocateAt(r *blk.Req, first, n int64) error {
	if err := s.markDirty(r); err != nil {
		return err
	}
	for {
		again, err := s.coverRun(r, first, n)
		if err != nil {
			return err
		}
		if !again {
			break
		}
	}
	for i := range n {
		if v, err := s.refcount(r, first+i); err != nil || v != 0 {
			s.unref(r, freed{off: first << s.cb, n: i << s.cb})
			return cmp.Or[error](err, errInval)
		}
		if err := s.addRef(r, first+i, 1); err != nil {
			s.unref(r, freed{off: first << s.cb, n: i << s.cb})
			return err
		}
	}
	return nil
}

// coverRun makes refcount blocks for clusters [first, first+n); again tells that one was
// made, which may have taken clusters of the run.
func (s *image) coverRun(r *blk.Req, first, n int64) (again bool, err error) {
	bits := s.geo.RefblockBits()
	last := (first + n - 1) >> bits
	if last >= s.reftSize {
		return true, s.growReftable(r, last)
	}
	for b := first >> bits; b <= last; b++ {
		if s.reftAt(b)&layout.ReftMask == 0 {
			return true, s.newBlock(r, b)
		}
	}
	return false, nil
}

// newBlock makes refcount block b, or one that it needs for its own cluster; the caller tries
// again until all are there.
func (s *image) newBlock(r *blk.Req, b int64) error {
	s.step(r, blk.EvRefblockAlloc)
	bits := s.geo.RefblockBits()
	c, _, next, err := s.findFree(r, s.lowest(), 1, 1)
	if err != nil {
		return err
	}
	cb := c >> bits
	if cb >= s.reftSize {
		return s.growReftable(r, cb)
	}
	if cb != b && s.reftAt(cb)&layout.ReftMask == 0 {
		// The block that counts c has to come first; it lies in c and counts itself.
		b = cb
	}
	if c == 0 && s.hdrUsed > 0 && s.busy == nil && !s.bare {
		return s.corrupt(r, true, -1, -1, "Preventing invalid allocation of refcount block at offset 0")
	}
	if err := s.checkOverlap(r, c<<s.cb, s.cs, 0); err != nil {
		return err
	}
	if err := s.roomForBlock(r); err != nil {
		return err
	}
	t := s.rb.alloc(c << s.cb)
	clear(t.data)
	if cb == b {
		s.geo.SetRefcount(t.data, c&(1<<bits-1), 1)
	}
	// At once, so that there is space for it or it is not made: no flush would succeed any more if it could not be written later.
	if err := s.writeMeta(r, t.data, t.off, 0); err != nil {
		return err
	}
	if cb != b {
		if err := s.addRef(r, c, 1); err != nil {
			return err
		}
	}
	s.rb.dropRange(t.off, s.cs)
	s.rb.insert(t)
	s.rb.markDirty(t)
	s.setReft(b, uint64(t.off))
	s.own(t.off, ownBlock, 1)
	s.noteEnd(t.off + s.cs)
	s.setLowest(next) // it was the first free one
	if s.made != nil {
		s.made(c, 1)
	}
	return nil
}

// writeBlocks writes all dirty refcount blocks, lowest first.
func (s *image) writeBlocks(r *blk.Req) error {
	if s.rb.ndirty == 0 {
		return nil
	}
	var ts []*table
	for t := s.rb.lru.next; t != &s.rb.lru; t = t.next {
		if t.dirty {
			ts = append(ts, t)
		}
	}
	sort.Slice(ts, func(i, j int) bool { return ts[i].off < ts[j].off })
	for _, t := range ts {
		s.step(r, blk.EvRefblockUpdatePart)
		if err := s.writeMeta(r, t.data, t.off, olRefcountBlock); err != nil {
			return err
		}
		s.rb.markClean(t)
	}
	return nil
}

// writeRefcounts writes refcount blocks and the refcount table's changes, with the barrier
// between the two but none behind.
func (s *image) writeRefcounts(r *blk.Req) error {
	if err := s.writeBlocks(r); err != nil {
		return err
	}
	if len(s.reftDirty) == 0 {
		return nil
	}
	if err := s.barrier(r); err != nil {
		return err
	}
	for k := range s.reftDirty {
		s.step(r, blk.EvRefblockAllocHookup)
		if err := s.writeMeta(r, s.encodeEntries(s.reftAt, k, s.reftSize), s.reftOffset()+k*512, olRefcountTable); err != nil {
			return err
		}
		delete(s.reftDirty, k)
	}
	return nil
}

// encodeEntries is the k-th group of 64 entries of a table as on disk; limit is the table's length.
func (s *image) encodeEntries(at func(i int64) uint64, k, limit int64) []byte {
	n := min(64, limit-k*64)
	b := make([]byte, 0, n*8)
	for i := k * 64; i < k*64+n; i++ {
		b = be.AppendUint64(b, at(i))
	}
	return b
}

// countedBlocks is the number of refcount blocks that count clusters in the file. What is said of clusters beyond its end has no
// meaning, and there may be 2^50 of them.
func (s *image) countedBlocks() int64 {
	return (s.geo.Clusters(max(s.file.Size(), s.fileEnd)) + 1<<s.geo.RefblockBits() - 1) >> s.geo.RefblockBits()
}

func (s *image) reftOffset() int64 { return int64(s.hdr.RefcountTableOffset) }

// growReftable makes the refcount table large enough for block need. The area behind what
// the old table covers takes the new table and the refcount blocks that count the area.
func (s *image) growReftable(r *blk.Req, need int64) error {
	s.step(r, blk.EvReftableGrow)
	bits := s.geo.RefblockBits()
	first := s.reftSize // block of the area's first cluster, which is at the block's beginning
	start := first << bits
	var blocks, clusters int64
	for {
		entries := max(need+1, s.reftSize*3/2, first+blocks)
		c := (entries*8 + s.cs - 1) >> s.cb
		n := (c + blocks + 1<<bits - 1) >> bits
		if c == clusters && n == blocks {
			break
		}
		clusters, blocks = c, n
	}
	if clusters<<s.cb > layout.MaxReftableBytes || (start+blocks+clusters)<<s.cb >= 1<<layout.MaxHostBits {
		return errTooBig
	}
	tabOff := (start + blocks) << s.cb
	// What the old table does not cover is not counted, whatever lies there.
	if v := s.survey; v != nil && start < v.found {
		for s.survey != nil && !v.endless {
			if err := s.vet(r); err != nil {
				return err
			}
		}
	}
	for c := start; c < start+blocks+clusters; c++ {
		if s.taken(c) {
			return s.corrupt(r, true, c<<s.cb, s.cs, "Preventing invalid allocation of refcount table at offset "+hex(uint64(c<<s.cb)))
		}
	}
	if err := s.checkOverlap(r, start<<s.cb, (blocks+clusters)<<s.cb, 0); err != nil {
		return err
	}
	oldReft, oldSize, oldOff := s.reft, s.reftSize, s.reftOffset()
	reft := make([]uint64, first+blocks, first+blocks+64)
	copy(reft, oldReft)
	undo := func() {
		for i := range blocks {
			s.rb.dropRange((start+i)<<s.cb, s.cs)
		}
	}
	for i := range blocks {
		if err := s.roomForBlock(r); err != nil {
			undo()
			return err
		}
		t := s.rb.alloc((start + i) << s.cb)
		clear(t.data)
		for k := int64(0); k < 1<<bits && i<<bits+k < blocks+clusters; k++ {
			s.geo.SetRefcount(t.data, k, 1)
		}
		s.rb.dropRange(t.off, s.cs)
		s.rb.insert(t)
		s.rb.markDirty(t)
		reft[first+i] = uint64(t.off)
	}
	if err := s.switchReftable(r, reft, tabOff, clusters); err != nil {
		undo()
		return err
	}
	for i := range blocks {
		s.own((start+i)<<s.cb, ownBlock, 1)
	}
	s.reft, s.reftSize = reft, clusters<<s.cb/8
	clear(s.reftDirty)
	if s.made != nil {
		s.made(start, blocks+clusters)
	}
	// The old table has gone from the disk already.
	s.sealed = true
	s.limbo = append(s.limbo, freed{oldOff, oldSize * 8, discardOther, s.epCur.seq})
	return nil
}

// switchReftable writes a new refcount table and then the header's pointer to it.
func (s *image) switchReftable(r *blk.Req, reft []uint64, off, clusters int64) error {
	s.step(r, blk.EvRefblockAllocWriteBlocks)
	if err := s.writeBlocks(r); err != nil {
		return err
	}
	s.step(r, blk.EvRefblockAllocWriteTable)
	b := make([]byte, clusters<<s.cb)
	for i, v := range reft {
		be.PutUint64(b[8*i:], v)
	}
	if err := s.writeMeta(r, b, off, 0); err != nil {
		return err
	}
	if err := s.barrier(r); err != nil {
		return err
	}
	s.step(r, blk.EvRefblockAllocSwitchTable)
	field := func(off uint64, clusters uint32) []byte {
		return be.AppendUint32(be.AppendUint64(nil, off), clusters)
	}
	if err := s.swap(r, field(uint64(off), uint32(clusters)), field(s.hdr.RefcountTableOffset, s.hdr.RefcountTableClusters), layout.OffReftable); err != nil {
		return err
	}
	s.hdr.RefcountTableOffset, s.hdr.RefcountTableClusters = uint64(off), uint32(clusters)
	return nil
}
