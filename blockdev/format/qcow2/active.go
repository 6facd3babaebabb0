package qcow2

import (
	"errors"
	"fmt"

	"qblockd/blockdev/crypto/luks"
	"qblockd/graph/blk"
)

// Deactivated implements graph.Deactivator. Bitmaps are in the image from now on, where others may
// change them.
func (s *image) Deactivated() {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.passive = true
	forgetBitmaps(s)
	s.publishBitmaps()
}

// +checklocks:s.mu
func forgetBitmaps(s *image) {
	if s.keeper == nil {
		return
	}
	for _, m := range s.stored {
		s.keeper.forget(m.Name)
	}
}

var errOtherImage = errors.New("Another image has taken its place; it has to be closed and opened again")

// Activate implements graph.Activator: it reads everything again. If that fails the image cannot be
// read until it succeeds.
func (s *image) Activate(r *blk.Req) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead.Load() {
		return blk.ErrNoMedium
	}
	if err := s.reload(r); err != nil {
		forgetBitmaps(s)
		return fmt.Errorf("Could not reopen qcow2 layer: %w", err)
	}
	s.passive, s.signaled = false, false
	s.stale.Store(false)
	publishAll(s)
	return nil
}

// reload reads what openImage reads, of an image of the same geometry.
// +checklocks:s.mu
func (s *image) reload(r *blk.Req) error {
	h, first, err := peekHeader(&s.imageFile, r)
	if err != nil {
		return err
	}
	ext, err := h.ParseExtensions(first)
	if err != nil {
		return err
	}
	if h.Version != s.version || h.CompressionType != s.compression || h.Geometry() != s.geo || h.Raw() != s.rawBit ||
		h.CryptMethod != s.hdr.CryptMethod || ext.DataFile != s.dataName {
		return errOtherImage // requests and queries rely on these
	}
	back, err := h.BackingName(first)
	if err != nil {
		return err
	}
	s.stale.Store(true)
	s.setHeader(h, first)
	s.ext, s.backName = ext, back
	if err := reloadKeys(s, r); err != nil {
		return err
	}
	forgetAll(s)
	epochs := [2]uint64{s.l2.epoch, s.rb.epoch}
	if err := s.loadTables(r); err != nil {
		return err
	}
	s.l2.epoch, s.rb.epoch = epochs[0]+1, epochs[1]+1
	return s.loadRest(r)
}

// reloadKeys reads the header of an encrypted image. Passwords may have changed, but not the key.
// +checklocks:s.mu
func reloadKeys(s *image, r *blk.Req) error {
	if s.seal == nil || !s.seal.byHost() {
		return nil
	}
	if s.ext.Crypto == nil {
		return errOtherImage
	}
	h, err := luks.Read(keyArea{&s.imageFile, r}, false)
	if err != nil {
		return err
	}
	if was := s.seal.header.Load(); h.Spec != was.Spec || h.Digest != was.Digest || h.Salt != was.Salt {
		return errOtherImage
	}
	s.seal.header.Store(h)
	return nil
}

// forgetAll forgets what is not read again and follows from what was in the image. Nothing of it is
// in use: the node is quiet, and all was written and given back before it became inactive.
// +checklocks:s.mu
func forgetAll(s *image) {
	clear(s.l1Dirty)
	clear(s.reftDirty)
	s.endSurvey()
	s.wrong, s.prealloc = wrong{}, 0
	s.freeIdx, s.freeByte, s.dataEnd, s.fresh = 0, 0, 0, nil
	s.quarantine = newQuarantine()
	s.snaps, s.snapL1, s.inactive, s.flagsDue = nil, ranges{}, nil, false
	s.stored, s.badBitmaps, s.dirUnsure, s.storing = nil, false, false, false
	s.marks.Store(nil)
	s.toMark.take()
	s.unz = unzipped{}
}
