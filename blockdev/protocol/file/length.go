package file

import (
	"sync/atomic"

	"qblockd/graph/blk"
)

// length is how long the file is.
type length struct {
	size  atomic.Int64 // what Size says: eof rounded up to sectors
	eof   atomic.Int64 // the file's own length as far as we know; 0 <= eof <= size
	fixed bool         // a device, which does not grow
}

// Size implements graph.Driver: the length of the file rounded up to 512 bytes.
func (l *length) Size() int64 { return l.size.Load() }

// grow notes that the file reaches at least to end.
func (l *length) grow(end int64) {
	if end <= l.eof.Load() || l.fixed {
		return
	}
	raise(&l.eof, end)
	raise(&l.size, blk.AlignUp(end, blk.SectorSize))
}

// setEnd notes the file's length after a resize; no request runs that could grow it.
func (l *length) setEnd(n int64) {
	l.eof.Store(n)
	l.size.Store(blk.AlignUp(n, blk.SectorSize))
}

// raise makes a at least n.
func raise(a *atomic.Int64, n int64) {
	for {
		old := a.Load()
		if old >= n || a.CompareAndSwap(old, n) {
			return
		}
	}
}
