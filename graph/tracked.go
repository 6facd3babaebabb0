package graph

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"qblockd/graph/blk"
)

// Tracking keeps requests on one node apart that must not overlap in time. All writers
// (writes, zeroes, discards, resizes, copies) are tracked. Most are plain: they run
// concurrently even where they overlap, as on any disk. A serialising request - a
// read-modify-write, a copy-on-read, a growth, a write with blk.Serialising - excludes
// all tracked requests that overlap its range, which is widened to whole blocks.
//
// Readers are not tracked, save while TrackReads is on. That is safe:
//   - A read-modify-write stores in the padding the bytes that are there; who reads the padding
//     meanwhile gets those. Reading the rest races with a write, which is the client's affair.
//   - A copy-on-read or stream stores what the range reads as already; a concurrent reader
//     gets the same bytes from above or from below.
//   - A growth has no readers in the new area: it is beyond the end until the size changes.
//   - Only jobs that change what is below (a fleecing target's backing) need to know
//     that earlier reads are over before their serialising write ends. They take TrackReads first.
//     A read that is under way then escapes, unless the node is drained; it began before the point
//     in time was there.
//
// A unit of work may hold a range of the node (LockRange) over several requests; these do not wait
// for their own lock.
//
// A request waits only for overlapping ones that were registered on the same node before it, and a
// request that waits holds registrations on nodes above only: so nobody waits in a circle.
//
// The list is sharded: plain requests lock one shard, and only serialising ones, or plain
// ones while there is a serialising one, lock them all, in order.
type tracker struct {
	serial atomic.Int32 // serialising requests registered; raised with all shards locked
	reads  atomic.Int32 // TrackReads nesting
	ticket uint64       // last one given; guarded by all shards' locks
	shards [trackShards]trackShard
}

const trackShards = 8

// trackShard fills a cache line, so that shards do not slow each other down.
type trackShard struct {
	inFlight atomic.Int64 // requests inside the node

	mu   sync.Mutex
	head *tracked // registered requests; guarded by mu
	free *tracked // to be used again, through next; guarded by mu
	_    [64 - 4*8]byte
}

// tracked is a registered request.
type tracked struct {
	off, n     int64  // the range that counts for overlaps
	ticket     uint64 // order of registration; 0 is before all others
	serial     bool
	unit       *blk.Req // the unit of work; one does not wait for itself
	shard      *trackShard
	prev, next *tracked // guarded by shard.mu
	done       signal   // the end; guarded by shard.mu
}

// shard picks the shard of a unit of work; units running at the same time mostly differ.
func (t *tracker) shard(r *blk.Req) *trackShard {
	h := uint64(uintptr(unsafe.Pointer(r))) * 0x9e3779b97f4a7c15
	return &t.shards[h>>61]
}

// begin registers [off, off+n) and waits for older requests in its way. Errors: blk.ErrWouldBlock
// if r must not wait, the cause of the end of r's context; nothing is registered then.
func (t *tracker) begin(r *blk.Req, off, n int64, serial bool) (*tracked, error) {
	sh := t.shard(r)
	if !serial {
		if !r.NoWait {
			sh.mu.Lock()
		} else if !sh.mu.TryLock() {
			return nil, blk.ErrWouldBlock
		}
		if t.serial.Load() == 0 {
			k := sh.take() // +checklocksforce: TryLock
			k.off, k.n, k.serial, k.ticket, k.unit = off, n, false, 0, r
			sh.push(k)
			sh.mu.Unlock()
			return k, nil
		}
		sh.mu.Unlock() // +checklocksforce: TryLock
	}
	return t.beginSlow(r, sh, off, n, serial)
}

// beginSlow is begin with all shards locked.
func (t *tracker) beginSlow(r *blk.Req, sh *trackShard, off, n int64, serial bool) (*tracked, error) {
	if !t.lockAll(r.NoWait) {
		return nil, blk.ErrWouldBlock
	}
	t.ticket++
	k := sh.take() // +checklocksignore: all are locked
	k.off, k.n, k.serial, k.ticket, k.unit = off, n, serial, t.ticket, r
	c := t.conflict(k)
	if c != nil && r.NoWait {
		sh.drop(k)
		t.unlockAll()
		return nil, blk.ErrWouldBlock
	}
	sh.push(k)
	if serial {
		t.serial.Add(1)
	}
	for c != nil {
		over := c.done.wait()
		t.unlockAll()
		if err := r.Await(over); err != nil {
			t.end(k)
			return nil, err
		}
		t.lockAll(false)
		c = t.conflict(k)
	}
	t.unlockAll()
	return k, nil
}

// end takes k off the list and wakes who waits for it.
func (t *tracker) end(k *tracked) {
	sh := k.shard
	sh.mu.Lock()
	if k.prev != nil {
		k.prev.next = k.next
	} else {
		sh.head = k.next
	}
	if k.next != nil {
		k.next.prev = k.prev
	}
	done, serial := k.done, k.serial
	sh.drop(k)
	sh.mu.Unlock()
	if serial {
		t.serial.Add(-1)
	}
	done.send()
}

// take gives an unused entry.
// +checklocks:sh.mu
func (sh *trackShard) take() *tracked {
	k := sh.free
	if k == nil {
		return &tracked{shard: sh}
	}
	sh.free = k.next
	return k
}

// drop takes back an entry that is not in the list; sh.mu is held.
func (sh *trackShard) drop(k *tracked) {
	k.prev, k.next, k.done, k.unit = nil, sh.free, signal{}, nil
	sh.free = k
}

// push inserts k; sh.mu is held.
func (sh *trackShard) push(k *tracked) {
	k.prev, k.next = nil, sh.head
	if sh.head != nil {
		sh.head.prev = k
	}
	sh.head = k
}

// conflict finds an older request that k has to wait for. All shards are locked.
func (t *tracker) conflict(k *tracked) *tracked {
	// Inside a lock of one's own unit there is nobody to wait for: whoever overlaps the lock was
	// waited for when it was taken, or waits for it now - and to wait for those would be for ever.
	for c := k.shard.head; c != nil; c = c.next {
		if c.unit == k.unit && c.serial && c.off <= k.off && k.off+k.n <= c.off+c.n && c != k {
			return nil
		}
	}
	for i := range t.shards {
		for c := t.shards[i].head; c != nil; c = c.next {
			if c.ticket < k.ticket && (k.serial || c.serial) && c.unit != k.unit && blk.Overlap(c.off, c.n, k.off, k.n) {
				return c
			}
		}
	}
	return nil
}

// lockAll locks all shards. With try it does so only if that takes no waiting, and tells whether it
// has.
// +checklocksignore: it does not know the elements of an array.
func (t *tracker) lockAll(try bool) bool {
	for i := range t.shards {
		if !try {
			t.shards[i].mu.Lock()
		} else if !t.shards[i].mu.TryLock() {
			for i--; i >= 0; i-- {
				t.shards[i].mu.Unlock()
			}
			return false
		}
	}
	return true
}

// +checklocksignore: see lockAll.
func (t *tracker) unlockAll() {
	for i := range t.shards {
		t.shards[i].mu.Unlock()
	}
}

// inFlight is the number of requests inside the node.
func (t *tracker) inFlight() (n int64) {
	for i := range t.shards {
		n += t.shards[i].inFlight.Load()
	}
	return n
}

// RangeLock is a range of a node that one unit of work holds: see LockRange.
type RangeLock struct {
	t *tracker
	k *tracked
}

// LockRange registers [off, off+size), widened to the node's allocation units, as serialising until
// Unlock: no other unit of work writes there meanwhile. Requests of r itself are not held up. The
// lock is taken inside a unit of work and released before its end; two locks of one unit on the
// same node must be taken in the order of their offsets, and requests that begin inside a lock
// should end inside it. Errors: blk.ErrOutOfRange, blk.ErrWouldBlock, the cause of the end of r's
// context.
func (e *Edge) LockRange(r *blk.Req, off, size int64) (RangeLock, error) {
	s := &e.node.Load().io
	if !blk.ValidRange(off, size) || size == 0 {
		return RangeLock{}, blk.ErrOutOfRange
	}
	p := blk.Pad(off, size, max(s.drv.align, s.drv.caps.Limits.ClusterSize))
	k, err := s.track.begin(r, p.Off, p.N, true)
	return RangeLock{&s.track, k}, err
}

// Unlock releases the range.
func (l RangeLock) Unlock() { l.t.end(l.k) }

// TrackReads makes reads of n wait for overlapping serialising requests and the other way round
// until release is called (once). Reads that are under way escape, unless n is drained meanwhile;
// it can be released at any time.
func (s *IO) TrackReads() (release func()) {
	s.track.reads.Add(1)
	return sync.OnceFunc(func() { s.track.reads.Add(-1) })
}

// InFlight is the number of requests under way inside n.
func (s *IO) InFlight() int64 { return s.track.inFlight() }
