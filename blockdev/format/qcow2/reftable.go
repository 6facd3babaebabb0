package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// newReftArea tells how large a refcount table with block need is, in clusters, and how many
// refcount blocks it takes to count the area that both of them lie in: it begins behind what the
// table covers now.
// +checklocks:s.mu
func (s *allocator) newReftArea(need int64) (blocks, clusters int64, err error) {
	bits := s.geo.RefblockBits()
	for {
		entries := max(need+1, s.reftSize*3/2, s.reftSize+blocks)
		c := (entries*8 + s.cs - 1) >> s.cb
		n := (c + blocks + 1<<bits - 1) >> bits
		if c == clusters && n == blocks {
			break
		}
		clusters, blocks = c, n
	}
	end := (s.reftSize<<bits + blocks + clusters) << s.cb
	if clusters<<s.cb > layout.MaxReftableBytes || end >= 1<<layout.MaxHostBits {
		return 0, 0, errTooBig
	}
	return blocks, clusters, nil
}

// growReftable makes the refcount table large enough for block need. The area behind what the old
// table covers takes the refcount blocks that count the area, and then the new table.
// +checklocks:s.mu
func (s *allocator) growReftable(r *blk.Req, need int64) error {
	s.step(r, blk.EvReftableGrow)
	blocks, clusters, err := s.newReftArea(need)
	if err != nil {
		return err
	}
	bits := s.geo.RefblockBits()
	first := s.reftSize // block of the area's first cluster, which is at the block's beginning
	start := first << bits
	// What the old table does not cover is not counted, whatever lies there.
	for v := s.survey; v != nil && start < v.found && s.surveying(); {
		if err := s.vet(r); err != nil {
			return err
		}
	}
	for c := start; c < start+blocks+clusters; c++ {
		if s.taken(c) {
			at := c << s.cb
			return s.corrupt(r, at, s.cs, "Preventing invalid allocation of refcount table at offset %s", hex(at))
		}
	}
	if err := s.checkOverlap(r, start<<s.cb, (blocks+clusters)<<s.cb, 0); err != nil {
		return err
	}
	oldSize, oldOff := s.reftSize, s.reftOffset()
	reft := make([]uint64, first+blocks, first+blocks+64)
	copy(reft, s.reft)
	err = s.newReftBlocks(r, reft[first:], start, blocks+clusters)
	if err == nil {
		err = s.switchReftable(r, reft, (start+blocks)<<s.cb, clusters)
	}
	if err != nil {
		s.rb.dropRange(start<<s.cb, blocks<<s.cb)
		return err
	}
	for i := range blocks {
		s.own((start+i)<<s.cb, ownBlock, 1)
	}
	s.reft, s.reftSize = reft, clusters<<s.cb/8
	clear(s.reftDirty)
	s.took(start, blocks+clusters)
	s.quarantine.retire(oldOff, oldSize*8)
	return nil
}

// newReftBlocks makes refcount blocks that count n clusters from start, in the first of them, and
// enters them into reft.
// +checklocks:s.mu
func (s *allocator) newReftBlocks(r *blk.Req, reft []uint64, start, n int64) error {
	bits := s.geo.RefblockBits()
	for i := range reft {
		if err := s.roomForBlock(r); err != nil {
			return err
		}
		t := s.rb.alloc((start + int64(i)) << s.cb)
		clear(t.data)
		for k := range min(n-int64(i)<<bits, 1<<bits) {
			s.geo.SetRefcount(t.data, k, 1)
		}
		s.rb.dropRange(t.off, s.cs)
		s.rb.insert(t)
		s.rb.markDirty(t)
		reft[i] = uint64(t.off)
	}
	return nil
}

// switchReftable writes a new refcount table and then the header's pointer to it.
// +checklocks:s.mu
func (s *allocator) switchReftable(r *blk.Req, reft []uint64, off, clusters int64) error {
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
	was := be.AppendUint32(be.AppendUint64(nil, s.hdr.RefcountTableOffset), s.hdr.RefcountTableClusters)
	now := be.AppendUint32(be.AppendUint64(nil, uint64(off)), uint32(clusters))
	if err := s.swap(r, now, was, layout.OffReftable); err != nil {
		return err
	}
	s.hdr.RefcountTableOffset, s.hdr.RefcountTableClusters = uint64(off), uint32(clusters)
	return nil
}

// reftAt is entry b of the refcount table; zero where the table ends.
// +checklocks:s.mu
func (s *refcounts) reftAt(b int64) uint64 {
	if b < int64(len(s.reft)) {
		return s.reft[b]
	}
	return 0
}

// +checklocks:s.mu
func (s *refcounts) setReft(b int64, v uint64) {
	for int64(len(s.reft)) <= b {
		s.reft = append(s.reft, 0)
	}
	s.reft[b] = v
	s.reftDirty[b>>6] = struct{}{}
}

// encodeEntries is the k-th group of 64 entries of a table as on disk; limit is the table's length.
func encodeEntries(at func(i int64) uint64, k, limit int64) []byte {
	n := min(64, limit-k*64)
	b := make([]byte, 0, n*8)
	for i := k * 64; i < k*64+n; i++ {
		b = be.AppendUint64(b, at(i))
	}
	return b
}

// syncRefcounts is writeRefcounts with a barrier behind it, too.
// +checklocks:s.mu
func (s *refcounts) syncRefcounts(r *blk.Req) error {
	if err := s.writeRefcounts(r); err != nil {
		return err
	}
	return s.barrier(r)
}

// writeRefcounts writes refcount blocks and the refcount table's changes, with a barrier between
// them but none behind.
// +checklocks:s.mu
func (s *refcounts) writeRefcounts(r *blk.Req) error {
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
		b := encodeEntries(s.reftAt, k, s.reftSize)
		if err := s.writeMeta(r, b, s.reftOffset()+k*512, olRefcountTable); err != nil {
			return err
		}
		delete(s.reftDirty, k)
	}
	return nil
}
