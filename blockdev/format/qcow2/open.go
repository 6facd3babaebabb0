package qcow2

import (
	"errors"
	"sync"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// image is an open image.
type image struct {
	requests

	resizing sync.Mutex // one Resize at a time; taken before marking and mu

	closed    bool   // +checklocks:mu
	stopClean func() // +checklocks:mu
}

// openImage opens the image in c.file. Checks come in QEMU's order. A read-only image is not
// touched; a writable one gets its autoclear bits cleared and, if it is dirty, is repaired.
func openImage(r *blk.Req, c config) (*image, error) {
	s := &image{}
	s.config, s.above = c, s
	s.l1Dirty, s.reftDirty = map[int64]struct{}{}, map[int64]struct{}{}
	s.quarantine = newQuarantine()
	s.zipping.Limit, s.copying.Limit = budgetZip, budgetCopy
	s.unzipping.Limit, s.decoding.Limit = budgetUnzip, budgetDecode
	s.wake, s.done = sync.NewCond(&s.mu), sync.NewCond(&s.mu)
	if err := s.load(r); err != nil {
		s.forget()
		return nil, err
	}
	return s, nil
}

// load reads what openImage needs.
func (s *image) load(r *blk.Req) error {
	if pick(s.options.XQblockdForCheck, false) && !s.readOnly {
		return errors.New("'x-qblockd-for-check' can only be set for read-only nodes")
	}
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	first, err := s.readHeader(r)
	if err != nil {
		return err
	}
	if err := s.loadTables(r); err != nil {
		return err
	}
	sayFormat(s.options.Encrypt, s.hdr)
	if s.ext, err = s.hdr.ParseExtensions(first); err != nil {
		return err
	}
	if err := s.findData(); err != nil {
		return err
	}
	if err := s.unlock(r); err != nil {
		return err
	}
	if s.backName, err = s.hdr.BackingName(first); err != nil {
		return err
	}
	if err := s.loadRest(r); err != nil {
		return err
	}
	if !s.readOnly {
		if err := s.becomeWriter(r); err != nil {
			return err
		}
	}
	publishAll(s)
	s.startCleaning()
	return nil
}

// loadRest reads snapshots and bitmaps.
// +checklocks:s.mu
func (s *image) loadRest(r *blk.Req) (err error) {
	if err := s.knowSnapshots(r); err != nil {
		return err
	}
	if s.options.XQblockdSnapshot != nil {
		err = s.showSnapshot(r, *s.options.XQblockdSnapshot) // the bitmaps are of another disk
	} else {
		err = s.loadBitmaps(r)
	}
	if err != nil {
		return err
	}
	s.fileEnd = s.file.Size()
	if s.set.overlap&olInactiveL2 != 0 {
		s.inactive, err = s.findInactive(r)
	}
	return err
}

// publishAll makes what queries show known to them.
// +checklocks:s.mu
func publishAll(s *image) {
	s.publish()
	s.publishBitmaps()
	s.publishSnapshots()
}

// findData refuses an image that has its guest data in another file, if that is not there, and
// others that are given one.
// +checklocks:s.mu
func (s *image) findData() error {
	switch {
	case s.external != nil && !s.geo.External:
		return errors.New("'data-file' can only be set for images with an external data file")
	case !s.geo.External:
		return nil
	}
	s.dataName = s.ext.DataFile
	switch {
	case s.external != nil:
		return nil
	case s.dataName == "":
		return errors.New("'data-file' is required for this image")
	}
	return &driver.ChildNeeded{Name: dataFile, Role: perm.Data, File: s.dataName}
}

// dataFile is the child that has the guest data, if not file.
const dataFile = "data-file"

// loadTables reads L1 and refcount tables, resolves the options and makes the caches.
// +checklocks:s.mu
func (s *image) loadTables(r *blk.Req) (err error) {
	if s.l1, err = s.readTable(r, int64(s.hdr.L1TableOffset), int64(s.hdr.L1Size)); err != nil {
		return wrap("Could not read L1 table", err)
	}
	if s.set, err = resolve(&s.options, s.hdr, s.unmap); err != nil {
		return err
	}
	s.makeCaches()
	s.reftSize = int64(s.hdr.RefcountTableClusters) << s.cb / 8
	s.step(r, blk.EvReftableLoad)
	reft, err := s.readTable(r, s.reftOffset(), s.reftSize)
	if err != nil {
		return wrap("Could not initialize refcount handling", err)
	}
	s.reft = reft.dense()
	// Of its size from the beginning: a map that grows leaves as much garbage again.
	n := len(s.reft)
	for i, e := s.l1.next(0); e != 0; i, e = s.l1.next(i + 1) {
		n++
	}
	s.owners = make(map[int64]owner, n)
	for i, e := s.l1.next(0); e != 0; i, e = s.l1.next(i + 1) {
		if off := int64(e & layout.OffsetMask); off != 0 {
			s.own(off, ownL2, 1)
		}
	}
	for _, e := range s.reft {
		if off := int64(e & layout.ReftMask); off > 0 {
			s.own(off, ownBlock, 1)
		}
	}
	return nil
}

// becomeWriter does what the format asks of a program that opens an image for writing.
// +checklocks:s.mu
func (s *image) becomeWriter(r *blk.Req) error {
	if !s.bare {
		s.startSurvey()
	}
	if err := s.dropStale(r); err != nil {
		return err
	}
	// Before the bitmaps get clusters: which ones are free is known afterwards only.
	if s.hdr.IncompatibleFeatures&layout.IncompatDirty != 0 && !s.bare {
		res, err := s.repair(r)
		if err == nil && res.Errors > 0 {
			err = errIO
		}
		if err != nil {
			return wrap("Could not repair dirty image", err)
		}
		if s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
			s.endSurvey() // all was looked at
		}
	}
	if len(s.stored) > 0 {
		// They will move to new clusters, and their old ones are freed.
		if err := s.vet(r); err != nil {
			return err
		}
	}
	if err := s.claimBitmaps(r); err != nil {
		return wrap("Could not update bitmap directory", err)
	}
	return nil
}

// dropStale clears the autoclear bits that nobody keeps up to date any more once the image is
// written to, with what they stand for.
// +checklocks:s.mu
func (s *image) dropStale(r *blk.Req) error {
	known := uint64(0)
	if s.geo.External {
		known = layout.AutoclearDataFileRaw
	}
	if s.ext.Bitmaps != nil && !s.badBitmaps {
		known |= layout.AutoclearBitmaps | layout.AutoclearMarks
	}
	if s.hdr.AutoclearFeatures&^known != 0 || s.ext.BitmapsStale || s.badBitmaps {
		autoclear, ext, bad := s.hdr.AutoclearFeatures, *s.ext, s.badBitmaps
		if s.ext.BitmapsStale || s.badBitmaps {
			s.warnf("The persistent bitmaps of the image were not kept up to date and are dropped; some clusters may be leaked")
			s.ext.Bitmaps, s.ext.BitmapsStale, s.badBitmaps = nil, false, false
		}
		s.hdr.AutoclearFeatures &= known
		if err := s.updateHeader(r); err != nil {
			s.hdr.AutoclearFeatures, *s.ext, s.badBitmaps = autoclear, ext, bad // it is still to be done
			return wrap("Could not update qcow2 header", err)
		}
	}
	return nil
}

// startCleaning gives unused cache entries back every now and then.
// +checklocks:s.mu
func (s *image) startCleaning() {
	if s.stopClean = func() {}; s.set.cleanInterval == 0 {
		return
	}
	d := time.Duration(s.set.cleanInterval) * time.Second
	var t *time.Timer
	t = panics.AfterFunc("the cleaning of qcow2 caches", d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.closed {
			return
		}
		s.l2.clean()
		s.rb.clean()
		t.Reset(d)
	})
	s.stopClean = func() { t.Stop() }
}

// wrap words an error of I/O as "text: errno in words" and keeps err in the chain.
func wrap(text string, err error) error { return blk.Errnof(err, "%s", text) }
