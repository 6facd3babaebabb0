package qcow2

import (
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// preallocate gives guest clusters [from, to) host clusters. What is in those must not be seen:
// either nothing was ever written there, or their entries do not say that they are data, or, in
// images of version 2 in files that may hold anything, they are written. (A new encrypted image has
// no key yet, and begins as noise if it is of version 2.) In another file there is only one place.
// +checklocks:s.mu
func (s *image) preallocate(r *blk.Req, from, to int64, m blk.Prealloc) error {
	for gc := from; gc < to; {
		if err := s.room(r); err != nil {
			return err
		}
		k := min(to-gc, s.sliceLeft(gc))
		t, err := s.sliceForWrite(r, gc)
		if err != nil {
			return wrap("Allocating clusters failed", err)
		}
		host := gc << s.cb
		if !s.geo.External {
			t.pins++
			host, k, err = s.placeAhead(r, gc, k, m)
			t.pins--
		}
		if err != nil {
			return err
		}
		for j := range k {
			s.setCell(t, s.l2Index(gc)+j, s.placed(host+j<<s.cb, (gc+j)<<s.cb))
		}
		gc += k
	}
	return nil
}

// placeAhead takes up to k host clusters for the guest clusters from gc on.
// +checklocks:s.mu
func (s *allocator) placeAhead(r *blk.Req, gc, k int64, m blk.Prealloc) (host, n int64, err error) {
	// Behind the end of a device is no place; the other modes are for files that grow.
	if m == blk.PreallocMetadata && !s.zeroInit() {
		host, n, err = s.allocate(r, 1, k, "data cluster")
		host <<= s.cb
		s.noteEnd(host + n<<s.cb)
	} else {
		host, n, err = s.allocateEnd(r, k)
	}
	if err != nil {
		return 0, 0, wrap("Allocating clusters failed", err)
	}
	err = s.extendFile(r, host+n<<s.cb, m)
	if err == nil && s.version < 3 && !s.zeroInit() {
		err = s.blank(r, host, gc<<s.cb, n<<s.cb)
	}
	if err != nil {
		s.unref(r, freed{off: host, n: n << s.cb})
		return 0, 0, err
	}
	return host, n, nil
}

// blank makes n bytes at host, which are at off of the disk, data that read as zeroes.
// +checklocks:s.mu
func (s *allocator) blank(r *blk.Req, host, off, n int64) (err error) {
	s.wrote++
	switch {
	case s.seal != nil:
		const piece = 1 << 20
		b := make([]byte, min(n, piece))
		for at := int64(0); at < n && err == nil; at += piece {
			if err = ended(r); err == nil {
				err = s.writeData(r, blk.Buf(b[:min(n-at, piece)]), host+at, off+at)
			}
		}
	case !s.sealing:
		err = s.file.Zero(r, host, n, 0)
	}
	return err
}

// placed is the entry of a preallocated cluster, which is at off of the disk. Where what was never
// written reads as noise it has the zero flag, in images of version 3; if entries are extended,
// nothing of it is said to be there, or the zeroes that hide what lies below.
// +checklocks:s.mu
func (s *tables) placed(host, off int64) cell {
	e := uint64(host) | layout.Copied
	switch {
	case s.geo.Extended && s.backSize() <= off && !s.backLater(), !s.geo.Extended && (s.zeroInit() || s.version < 3):
		return cell{word: e}
	}
	return s.zeroed(e)
}
