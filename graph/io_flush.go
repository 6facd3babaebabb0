package graph

import (
	"context"
	"sync"
	"sync/atomic"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// flushState lets one flush at a time run on a node and skips those that have nothing to do.
//
//	write ends -> written+1;  a flush notes written, flushes, sets flushed to what it noted
//
// so everything that had been written when a flush began is on the medium once flushed has reached
// what it noted.
type flushState struct {
	written atomic.Uint64 // generation of content: raised after each change
	mu      sync.Mutex
	flushed atomic.Uint64 // generation that is on the medium; written under mu
	// active: a flush is running.
	active bool // +checklocks:mu
	// over: the running flush has ended.
	over signal // +checklocks:mu
}

// begin waits until no flush is running and makes the caller's the running one; gen is what it will
// have flushed. needed false: one that began after the call did the work meanwhile; end must not
// follow.
func (s *flushState) begin(r *blk.Req) (gen uint64, needed bool, err error) {
	gen = s.written.Load()
	waited := false
	if r.NoWait {
		if !s.mu.TryLock() {
			return 0, false, blk.ErrWouldBlock
		}
	} else {
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	for s.active { // +checklocksforce: TryLock
		if r.NoWait {
			return 0, false, blk.ErrWouldBlock
		}
		over := s.over.wait()
		s.mu.Unlock()
		err = r.Await(over)
		s.mu.Lock()
		if err != nil {
			return 0, false, err
		}
		waited = true
	}
	if waited && gen <= s.flushed.Load() && gen > 0 {
		return gen, false, nil
	}
	s.active = true
	return s.written.Load(), true, nil
}

// end ends the running flush; ok: generation gen is on the medium.
func (s *flushState) end(gen uint64, ok bool) {
	s.mu.Lock()
	s.active = false
	if ok {
		s.flushed.Store(max(s.flushed.Load(), gen))
	}
	s.over.send()
	s.mu.Unlock()
}

// Generation grows with each change of what the node holds, once that is over.
func (s *IO) Generation() uint64 { return s.flush.written.Load() }

// clean tells whether generation gen is on the medium.
func (s *flushState) clean(gen uint64) bool { return s.flushed.Load() >= gen }

// Flush puts all writes that have ended on stable storage, as far as the node's options
// (cache.no-flush) let it. Errors: blk.ErrWouldBlock, those of the driver.
func (e *Edge) Flush(r *blk.Req) error { return e.node.Load().io.flushNode(r) }

// flushNode flushes n and what is below. A node without children asks its driver only if something
// was written since the last flush that succeeded; a node with children always asks (its driver may
// hold metadata back), and its children decide for themselves. A node that has failed can tell of
// nothing that it is on the medium.
func (s *IO) flushNode(r *blk.Req) error {
	if s.drv.Driver == nil {
		return blk.ErrClosed
	}
	if s.n.readOnly.Load() || s.n.inactive.Load() {
		return nil
	}
	if s.n.guard.failed.Load() {
		return errFailed
	}
	kids := s.n.kids.Load().all
	if s.drv.flusher == nil && len(kids) == 0 {
		return nil
	}
	sh := s.track.shard(r)
	sh.inFlight.Add(1)
	defer sh.inFlight.Add(-1)
	for _, c := range kids {
		if c.role&perm.Primary != 0 {
			c.DebugEvent(r, blk.EvFlushToOS)
			c.DebugEvent(r, blk.EvFlushToDisk)
		}
	}
	if s.drv.flusher == nil {
		return s.flushChildren(r, kids)
	}
	if len(kids) == 0 && (s.n.opts.Load().NoFlush || s.flush.clean(s.flush.written.Load())) {
		return nil
	}
	gen, needed, err := s.flush.begin(r)
	if err != nil || !needed {
		return err
	}
	err = s.drv.Flush(r)
	s.flush.end(gen, err == nil)
	return err
}

// flushChildren flushes the children that n may write to, all of them also if one fails.
func (s *IO) flushChildren(r *blk.Req, kids []*Edge) (err error) {
	for _, c := range kids {
		if perm.Perm(c.claim.Load())&(perm.Write|perm.WriteUnchanged) == 0 {
			continue
		}
		if e := c.Flush(r); e != nil && err == nil {
			err = e
		}
	}
	return err
}

// Flush is Edge.Flush for those who hold n quiet and have no edge to it.
func (s *IO) Flush(ctx context.Context) error { return s.flushNode(&blk.Req{Ctx: ctx}) }
