package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// refcounts are the refcount table and the refcount blocks, some of which are cached. Their methods
// need mu.
type refcounts struct {
	imageFile

	// reft may be shorter than the table: what lies behind is zero.
	reft []uint64 // +checklocks:mu
	// reftDirty are the groups of 64 entries that are to be written.
	reftDirty map[int64]struct{} // +checklocks:mu
	rb        *cache             // +checklocks:mu
	// prealloc tells whether metadata are preallocated: 0 unknown, 1 no, 2 yes.
	prealloc int8 // +checklocks:mu
}

// refblock returns refcount block b, nil if there is none.
// +checklocks:s.mu
func (s *refcounts) refblock(r *blk.Req, b int64) (*table, error) {
	off := int64(s.reftAt(b) & layout.ReftMask)
	if off == 0 {
		return nil, nil
	}
	if t := s.rb.get(off); t != nil {
		return t, nil
	}
	if off&(s.cs-1) != 0 || off < 0 {
		return nil, s.corrupt(r, -1, -1, "Refblock offset %s unaligned (reftable index: %s)", hex(off), hex(b))
	}
	if off >= s.end() {
		return nil, s.corrupt(r, -1, -1,
			"Refblock offset %s beyond the end of the file (reftable index: %s)", hex(off), hex(b))
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
// +checklocks:s.mu
func (s *refcounts) roomForBlock(r *blk.Req) error {
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
// +checklocks:s.mu
func (s *refcounts) refcount(r *blk.Req, c int64) (uint64, error) {
	bits := s.geo.RefblockBits()
	t, err := s.refblock(r, c>>bits)
	if t == nil || err != nil {
		return 0, err
	}
	return s.geo.Refcount(t.data, c&(1<<bits-1)), nil
}

// writeBlocks writes all dirty refcount blocks, lowest first.
// +checklocks:s.mu
func (s *refcounts) writeBlocks(r *blk.Req) error {
	for _, t := range s.rb.dirty() {
		s.step(r, blk.EvRefblockUpdatePart)
		if err := s.writeMeta(r, t.data, t.off, olRefcountBlock); err != nil {
			return err
		}
		s.rb.markClean(t)
	}
	return nil
}

// countedBlocks is the number of refcount blocks that count clusters in the file. What is said of
// clusters beyond its end has no meaning, and there may be 2^50 of them.
// +checklocks:s.mu
func (s *refcounts) countedBlocks() int64 {
	bits := s.geo.RefblockBits()
	return (s.geo.Clusters(s.end()) + 1<<bits - 1) >> bits
}

// lastCluster is the last one in the file that is counted, -1 if there is none.
// +checklocks:s.mu
func (s *refcounts) lastCluster(r *blk.Req) (int64, error) {
	bits := s.geo.RefblockBits()
	for b := min(int64(len(s.reft)), s.countedBlocks()) - 1; b >= 0; b-- {
		if err := ended(r); err != nil {
			return 0, err
		}
		t, err := s.refblock(r, b)
		if err != nil {
			return 0, err
		}
		for i := int64(1)<<bits - 1; t != nil && i >= 0; i-- {
			if s.geo.Refcount(t.data, i) > 0 {
				return b<<bits + i, nil
			}
		}
	}
	return -1, nil
}

// maxDetect bounds the refcount blocks that are read to detect preallocation, in bytes: those of a
// file of 2 TiB with clusters of the default size. What is longer counts as not preallocated.
const maxDetect = 64 << 20

// detectPrealloc finds out whether the file has many clusters that are counted but take no
// space, which means that data extents may be holes below.
// +checklocks:s.mu
func (s *refcounts) detectPrealloc(r *blk.Req) {
	s.prealloc = 1
	if s.allocated == nil {
		return
	}
	n, err := s.allocated()
	if err != nil {
		return
	}
	real := n >> s.cb
	limit := max(real*10/9, real+2)
	count := int64(0)
	bits := s.geo.RefblockBits()
	most := min(int64(len(s.reft)), s.countedBlocks(), maxDetect>>s.cb)
	for b := int64(0); b < most && count < limit; b++ {
		if ended(r) != nil {
			s.prealloc = 0 // the next one looks
			return
		}
		t, err := s.refblock(r, b)
		if err != nil {
			return
		}
		for i := int64(0); t != nil && i < 1<<bits; i++ {
			if s.geo.Refcount(t.data, i) != 0 {
				count++
			}
		}
	}
	if count >= limit {
		s.prealloc = 2
	}
}
