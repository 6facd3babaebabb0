package qcow2

import (
	"errors"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// PrepareReadOnly is the first half of a change of read-only of an open image whose node is
// drained: it refuses to make a corrupt image writable, and stores everything of one that is to
// become read-only. It changes nothing else, so there is nothing to undo.
func (s *image) PrepareReadOnly(r *blk.Req, readOnly bool) error {
	if readOnly {
		return s.Inactivate(r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.options.XQblockdSnapshot != nil {
		return errSnapshotShown
	}
	if s.hdr.IncompatibleFeatures&layout.IncompatCorrupt != 0 {
		return errors.New("qcow2: Image is corrupt; cannot be opened read/write")
	}
	if s.badTable != nil {
		return s.badTable
	}
	return s.usable()
}

// CommitReadOnly is the second half. The node is still drained, and its file writable (already, or
// still). An image that becomes writable gets what opening it so would have done; if that fails it
// stays read-only. If one was to become read-only and does not after all, readOnly is false, and it
// takes back what PrepareReadOnly did.
func (s *image) CommitReadOnly(r *blk.Req, readOnly bool) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.readOnly
	s.readOnly = readOnly
	switch {
	case readOnly:
		s.endSurvey()
		s.wrong = wrong{}
		s.storing = false
		if s.keeper != nil {
			s.keeper.readOnly(true)
		}
		return nil
	case !was:
		if !s.storing || s.dead.Load() {
			return nil // it did not come to that, or nothing is written any more
		}
		s.storing = false
		return s.claimBitmaps(r)
	}
	if err := s.becomeWriter(r); err != nil {
		s.readOnly = true
		return err
	}
	return nil
}
