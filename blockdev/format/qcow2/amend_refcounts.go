package qcow2

import (
	"fmt"
	"maps"
	"slices"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// newCounts are refcount table and blocks of another width, which are made behind all that the file
// has. Until the header refers to them, they are nothing to anybody; from then on the old ones are
// not counted any more.
type newCounts struct {
	geo    layout.Geometry
	first  int64          // cluster of the first block; the table is behind the last one
	blocks []int64        // which blocks there are
	table  int64          // clusters of the table
	old    map[int64]bool // clusters of the old table and blocks
}

func (n *newCounts) end() int64 { return n.first + int64(len(n.blocks)) + n.table }

// changeRefcounts gives refcounts another width. All else is flushed.
// +checklocks:s.mu
func (s *amender) changeRefcounts(r *blk.Req, order uint32) error {
	s.reap(r, false)
	if err := s.syncRefcounts(r); err != nil {
		return err
	}
	n := &newCounts{geo: s.geo, old: map[int64]bool{}}
	n.geo.RefcountOrder = uint(order)
	if err := s.planCounts(r, n); err != nil {
		return err
	}
	reft, err := s.writeCounts(r, n)
	if err == nil {
		err = s.barrier(r)
	}
	if err != nil {
		s.cutNew(r)
		return err
	}
	err = s.newHeader(r, func(h *layout.Header, _ *layout.Extensions) {
		h.RefcountOrder = order
		h.RefcountTableOffset = uint64(n.first+int64(len(n.blocks))) << n.geo.ClusterBits
		h.RefcountTableClusters = uint32(n.table)
	})
	if err != nil {
		s.cutNew(r)
		return blk.Errnof(err, "Could not update qcow2 header")
	}
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off > 0 {
			s.own(off, ownBlock, -1)
		}
	}
	for _, e := range reft {
		if e != 0 {
			s.own(int64(e), ownBlock, 1)
		}
	}
	s.reft, s.reftSize = reft, n.table<<s.cb/8
	clear(s.reftDirty)
	s.rb = newCache(int(s.cs), s.set.rbTables)
	s.freeIdx, s.freeByte, s.prealloc = 0, 0, 0
	return nil
}

// cutNew cuts off what was written behind all that the file has, and did not come into use.
// +checklocks:s.mu
func (s *amender) cutNew(r *blk.Req) {
	if s.usable() != nil {
		return
	}
	if err := s.cutFile(patient(r)); err != nil {
		s.warnf("The file keeps counts that did not come into use: %s", blk.ErrnoText(err))
	}
}

// maxLost is how much longer a file becomes at most for what was cut off.
const maxLost = 1 << 30

// planCounts finds out which blocks there are to be, and refuses counts that do not fit.
// +checklocks:s.mu
func (s *amender) planCounts(r *blk.Req, n *newCounts) error {
	for c := s.reftOffset() >> s.cb; c < s.geo.Clusters(s.reftOffset()+s.reftSize*8); c++ {
		n.old[c] = true
	}
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off > 0 {
			n.old[off>>s.cb] = true
		}
	}
	// What is counted behind the end of a file that was cut off may be referred to.
	n.first = s.geo.Clusters(s.end())
	have := map[int64]bool{}
	for b := range int64(len(s.reft)) {
		if err := s.planBlock(r, n, b, have); err != nil {
			return err
		}
	}
	if n.first<<s.cb-s.end() > maxLost {
		return errDamaged
	}
	shift := n.geo.RefblockBits()
	for before := -1; before != len(have); {
		before = len(have)
		last := max((n.first+int64(before)+n.table)>>shift, slices.Max(append(slices.Collect(maps.Keys(have)), 0)))
		n.table = s.geo.Clusters((last + 1) * 8)
		for c := n.first >> shift; c <= (n.first+int64(before)+n.table)>>shift; c++ {
			have[c] = true
		}
	}
	n.blocks = slices.Sorted(maps.Keys(have))
	if n.table<<s.cb > layout.MaxReftableBytes || n.end()<<s.cb >= 1<<layout.MaxHostBits {
		return errTooBig
	}
	return nil
}

// planBlock notes the new blocks for what the old block b counts.
// +checklocks:s.mu
func (s *amender) planBlock(r *blk.Req, n *newCounts, b int64, have map[int64]bool) error {
	if err := ended(r); err != nil {
		return err
	}
	if off := int64(s.reftAt(b) & layout.ReftMask); off&(s.cs-1) != 0 || off < 0 || off >= s.end() {
		return errDamaged
	}
	t, err := s.refblock(r, b)
	if t == nil || err != nil {
		return err
	}
	shift := s.geo.RefblockBits()
	for i := range int64(1) << shift {
		v := s.geo.Refcount(t.data, i)
		switch c := b<<shift + i; {
		case v == 0:
		case v > n.geo.RefcountMax():
			return fmt.Errorf("Cannot decrease refcount entry width to %d bits: Cluster at offset %s has a refcount of %d",
				1<<n.geo.RefcountOrder, hex(c<<s.cb), v)
		default:
			have[c>>n.geo.RefblockBits()] = true
			n.first = max(n.first, c+1)
		}
	}
	return nil
}

// writeCounts writes the new blocks and the new table, and returns that.
// +checklocks:s.mu
func (s *amender) writeCounts(r *blk.Req, n *newCounts) (reft []uint64, err error) {
	reft = make([]uint64, n.blocks[len(n.blocks)-1]+1)
	shift := n.geo.RefblockBits()
	for k, b := range n.blocks {
		if err := ended(r); err != nil {
			return nil, err
		}
		buf := make([]byte, s.cs)
		for i := range int64(1) << shift {
			c := b<<shift + i
			v := uint64(0)
			switch {
			case c >= n.end():
			case c >= n.first:
				v = 1
			default:
				if v, err = s.refcount(r, c); err != nil {
					return nil, err
				}
				if n.old[c] && v > 0 {
					v--
				}
			}
			n.geo.SetRefcount(buf, i, v)
		}
		off := (n.first + int64(k)) << s.cb
		if err := s.writeMeta(r, buf, off, 0); err != nil {
			return nil, err
		}
		reft[b] = uint64(off)
	}
	table := make([]byte, n.table<<s.cb)
	for i, e := range reft {
		be.PutUint64(table[8*i:], e)
	}
	return reft, s.writeMeta(r, table, (n.first+int64(len(n.blocks)))<<s.cb, 0)
}
