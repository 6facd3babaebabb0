package qcow2

import "qblockd/graph/blk"

// Flush brings all completed writes and the metadata that find them to stable storage.
func (s *image) Flush(r *blk.Req) error {
	if !s.lock(r) {
		return blk.ErrWouldBlock
	}
	s.locked()
	defer s.mu.Unlock()
	if s.readOnly {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return s.flush(r)
}

// Inactivate writes everything down: afterwards the image on disk is clean. No requests may run.
func (s *image) Inactivate(r *blk.Req) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly || s.dead.Load() || s.closed {
		return nil
	}
	if err := s.flush(r); err != nil {
		return err
	}
	// The guest's data come first: if bitmaps cannot be stored, the image says already that they
	// have missed writes.
	bitmaps := s.storeBitmaps(r)
	if s.giveOut(r, bitmaps) {
		bitmaps = s.storeBitmaps(r)
	}
	if err := s.flush(r); err != nil {
		return err
	}
	s.reap(r, true)
	if s.flagsDue {
		if _, err := s.fixFlags(r, 0); err != nil {
			return err
		}
		if err := s.flush(r); err != nil {
			return err
		}
		s.flagsDue = false
	}
	s.fillEnd(r)
	if err := s.markClean(r); err != nil {
		return err
	}
	if bitmaps != nil {
		return wrap("Could not store persistent bitmaps", bitmaps)
	}
	return nil
}

// fillEnd makes the file end with its last cluster: programs differ in what they make of a part of
// one.
// +checklocks:s.mu
func (s *image) fillEnd(r *blk.Req) {
	if s.file.Size() >= s.dataEnd {
		return
	}
	if last, err := s.lastCluster(r); err != nil || (last+1)<<s.cb != s.dataEnd {
		return // it was given back meanwhile
	}
	s.wrote++
	if err := s.file.Resize(ctxOf(r), s.dataEnd, false, blk.PreallocOff); err != nil {
		s.warnf("The file ends inside of a cluster: %s", blk.ErrnoText(err))
	}
}

// Close ends the image after Inactivate, whose errors were the caller's to report.
func (s *image) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly && !s.closed {
		s.tellLost()
	}
	s.closed = true
	s.stopClean()
	s.l2, s.rb = newCache(int(s.slice), 1), newCache(int(s.cs), 1)
	s.unz = unzipped{}
	s.forget()
	// Those who still know the node keep nothing of this.
	s.l1, s.owners, s.inactive = entries{}, map[int64]owner{}, nil
	return nil
}
