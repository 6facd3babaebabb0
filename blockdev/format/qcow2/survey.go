package qcow2

import (
	"cmp"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// Whoever made an image may have counted wrong, and on purpose. So before the first write a survey
// begins to count all that the image refers to (counter).
//
//	none --becomes writable--> due --first write--> walks L2 tables --> compares refcounts --> over
//
// The first step reads up to firstStep of tables, which is all of most images. Further ones follow
// with each write and each change of the metadata. Until it is over
//
//   - clusters are taken behind the end that the file had, and only where nothing points as far as
//     is known;
//   - what is freed keeps its refcount and its space; and
//   - what is written in place is referred to by a table that has been looked at, and by nothing
//     else that has been: all tables and metadata, and data of the tables so far.
//
// When it is over, refcounts that are lower than the number of references are raised. What cannot
// be mended so is known (wrong): clusters that someone takes for his own although others refer to
// them, and those that no refcount block counts. They are never given out, punched, freed or
// written to: who would do that ends the use of the image. From then on a refcount of 0 means that
// nothing refers to a cluster.
//
// A table is walked at the latest before it is changed, or what it refers to. What it comes to
// refer to is counted then (setEntry). What it no longer refers to stays counted, as its refcount
// stays.

const (
	// firstStep and nextStep are bytes of L2 tables, those of 32 and 8 GiB of disk with the default
	// clusters, and about as many bytes of counts.
	firstStep = 4 << 20
	nextStep  = 1 << 20
	// maxSurvey is what a survey may take in memory: enough for some 3 TiB of data in clusters of
	// the default size.
	maxSurvey = 64 << 20
)

// survey is one that is not over.
type survey struct {
	c       *counter // nil: it has not begun
	pages   []int64  // of the tally that are still to be compared; nil while tables are walked
	walked  bool
	found   int64 // clusters of the file when it began
	hint    int64 // no cluster from found to this is free
	raised  int   // so many refcounts were too low
	first   int64 // the first cluster of those
	failed  int   // I/O errors
	endless bool  // it is too large, or cannot be made: it will never be over
}

// wrong has the clusters whose refcounts a survey found to be wrong.
type wrong struct {
	n     int // 0: none
	t     tally
	first int64 // the one that was found first
	last  int64 // the highest one, or, where there could be no survey, the highest there may be
}

// surveyor counts what the image refers to, and compares that with the refcounts. Its methods need
// mu.
type surveyor struct {
	refcounts
	above references

	// survey is nil if none is due, or it is over.
	survey *survey // +checklocks:mu
}

// references are what the parts of an image above the surveyor refer to.
type references interface {
	countL1(c *counter) error
	countSnapshots(c *counter) error
	countBitmaps(c *counter) error
	// readL2 reads a whole L2 table as it is now, changes in the cache included.
	readL2(r *blk.Req, tab int64, buf []byte) error
}

// startSurvey makes a survey due: the image has become writable.
// +checklocks:s.mu
func (s *surveyor) startSurvey() {
	s.endSurvey()
	s.wrong, s.survey = wrong{}, &survey{}
}

// +checklocks:s.mu
func (s *surveyor) endSurvey() { s.survey, s.counted = nil, nil }

// surveying tells whether a survey is due or under way.
// +checklocks:s.mu
func (s *surveyor) surveying() bool { return s.survey != nil && !s.survey.endless }

// vet makes the next step of the survey, if one is due. It is called before the metadata change.
// +checklocks:s.mu
func (s *surveyor) vet(r *blk.Req) error {
	if !s.surveying() {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	if s.survey.c == nil {
		return s.beginSurvey(r)
	}
	return s.stepSurvey(r, cmp.Or(s.vetSteps[1], nextStep))
}

// vetAll makes the whole survey; mu is dropped between steps.
// +checklocks:s.mu
func (s *surveyor) vetAll(r *blk.Req) error {
	for s.surveying() {
		if err := s.vet(r); err != nil {
			return err
		}
		s.mu.Unlock()
		s.mu.Lock()
		if err := s.usable(); err != nil {
			return err
		}
	}
	return nil
}

// beginSurvey counts what header, L1 tables, refcount table and bitmaps refer to, and makes a step.
// +checklocks:s.mu
func (s *surveyor) beginSurvey(r *blk.Req) error {
	v := s.survey
	c := s.newCounter(r, &CheckResult{})
	c.all, c.most = true, maxSurvey
	err := s.countMeta(c)
	v.found = s.geo.Clusters(s.end())
	v.hint = v.found
	if err != nil {
		return s.surveyFailed(r, err)
	}
	v.c, s.counted = c, &c.t
	return s.stepSurvey(r, cmp.Or(s.vetSteps[0], firstStep))
}

// surveyFailed says what it means for the request that a survey cannot go on. Errors of I/O mean
// nothing: what could not be read is mostly nothing that the request needs.
// +checklocks:s.mu
func (s *surveyor) surveyFailed(r *blk.Req, err error) error {
	switch {
	case ended(r) != nil:
		return err // it goes on with the next request
	case err == errTables:
		return s.corrupt(r, -1, -1, "Tables of metadata lie over each other, or beyond the end of the file")
	case err != errTooBig && s.survey.failed < 1:
		s.survey.failed++
		s.warnf("What the image refers to cannot be looked at (%s): who changes it next tries again", blk.ErrnoText(err))
		return nil
	}
	s.warnf("What the image refers to cannot be looked at (%s): what is free in the file is not used", blk.ErrnoText(err))
	s.survey.endless, s.survey.c, s.survey.pages, s.counted = true, nil, nil, nil
	return nil
}

// stepSurvey goes on for about n bytes of tables or counts.
// +checklocks:s.mu
func (s *surveyor) stepSurvey(r *blk.Req, n int64) error {
	v := s.survey
	v.c.r = r
	if !v.walked {
		done, err := v.c.step(int(max(n>>s.cb, 1)))
		if err != nil {
			return s.surveyFailed(r, err)
		}
		if !done {
			return nil
		}
		v.walked, v.pages = true, v.c.t.order()
	}
	for k := max(n>>tallyBits, 1); k > 0 && len(v.pages) > 0; k-- {
		if err := s.comparePage(r, v.pages[0]); err != nil {
			return s.surveyFailed(r, err)
		}
		v.pages = v.pages[1:]
	}
	if len(v.pages) > 0 {
		return nil
	}
	s.endSurvey()
	if v.raised > 0 {
		s.warnf("The refcounts of %d clusters, of which the first is at %s, were too low and have been put right",
			v.raised, hex(v.first<<s.cb))
	}
	if s.wrong.n > 0 {
		// No event: QEMU has none before it comes upon such a cluster.
		s.warnf("The refcounts of %d clusters, of which the first is at %s, are wrong: who writes to them ends the use of the image",
			s.wrong.n, hex(s.wrong.first<<s.cb))
	}
	return nil
}

// comparePage compares the counts of a page of the tally with the refcounts.
// +checklocks:s.mu
func (s *surveyor) comparePage(r *blk.Req, page int64) error {
	if err := ended(r); err != nil {
		return err
	}
	bits := s.geo.RefblockBits()
	first, behind := page<<tallyBits, (page+1)<<tallyBits
	for b := first >> bits; b<<bits < behind; b++ {
		if err := s.compareWithBlock(r, b, max(first, b<<bits), min(behind, (b+1)<<bits)); err != nil {
			return err
		}
	}
	return nil
}

// compareWithBlock compares the counts of clusters [first, behind), which refcount block b counts.
// +checklocks:s.mu
func (s *surveyor) compareWithBlock(r *blk.Req, b, first, behind int64) error {
	c := s.survey.c
	off := int64(s.reftAt(b) & layout.ReftMask)
	bad := off == 0 || s.badBlock(c, off) || c.t.get(off>>s.cb) > 1
	var t *table
	for k := first; k < behind; k++ {
		n := c.t.get(k)
		if n == 0 {
			continue
		}
		if bad || c.t.torn(k) {
			s.wrong.add(k)
			continue
		}
		if t == nil {
			var err error
			if t, err = s.refblock(r, b); err != nil {
				return err
			}
		}
		i := k - b<<s.geo.RefblockBits()
		switch have := s.geo.Refcount(t.data, i); {
		case have >= n:
		case n > s.geo.RefcountMax():
			s.wrong.add(k)
		default:
			if s.survey.raised == 0 {
				s.survey.first = k
			}
			s.survey.raised++
			s.geo.SetRefcount(t.data, i, n)
			s.rb.markDirty(t)
		}
	}
	return nil
}

func (w *wrong) add(k int64) {
	if w.at(k) {
		return
	}
	if w.n == 0 {
		w.t, w.first = newTally(), k
	}
	w.n++
	w.last = max(w.last, k)
	w.t.add(k, 1, false)
}

// at tells whether the references of cluster k are known to be wrong.
func (w *wrong) at(k int64) bool { return w.n > 0 && w.t.get(k) > 0 }

// vetTable makes the next step of the survey, and walks the L2 table at off: it is to be changed,
// or what it refers to.
// +checklocks:s.mu
func (s *surveyor) vetTable(r *blk.Req, off int64) error {
	if err := s.vet(r); err != nil {
		return err
	}
	v := s.survey
	if v == nil || v.c == nil || off == 0 || off&(s.cs-1) != 0 {
		return nil
	}
	v.c.r = r
	err := v.c.walkTable(off >> s.cb)
	if err == nil {
		return nil
	}
	if e := s.surveyFailed(r, err); e != nil || v.endless {
		return e
	}
	return unwalkedError{err}
}

// unwalkedError says that an L2 table could not be looked at: it must not be changed.
type unwalkedError struct{ error }

func (e unwalkedError) Unwrap() error { return e.error }

// linked counts what an L2 entry has come to refer to, if its table was walked already.
// +checklocks:s.mu
func (s *surveyor) linked(table int64, old, e uint64) {
	v := s.survey
	if v == nil || v.c == nil || (old^e)&(layout.OffsetMask|layout.Compressed) == 0 {
		return
	}
	if x := v.c.l2[table>>s.cb]; x.walked {
		v.c.entry(e, x.n, x.active)
	}
}

// copiesTable counts the L2 table in cluster c, which is a new copy of one that was walked.
// +checklocks:s.mu
func (s *surveyor) copiesTable(c int64) {
	if v := s.survey; v != nil && v.c != nil {
		v.c.l2[c] = l2ref{n: 1, active: true, walked: true}
		v.c.t.add(c, 1, true)
	}
}

// canFree is called before L2 entry e is dropped. It fails if what e refers to is counted less
// often than it is referred to, as far as is known; the image is given up then.
// +checklocks:s.mu
func (s *surveyor) canFree(r *blk.Req, e uint64) error {
	off, n := s.geo.HostRange(e)
	if e&layout.Compressed == 0 && off&(s.cs-1) != 0 {
		return nil
	}
	return s.canFreeRange(r, off, n)
}

// +checklocks:s.mu
func (s *surveyor) canFreeRange(r *blk.Req, off, n int64) error {
	for c := off >> s.cb; c<<s.cb < off+n; c++ {
		v, err := s.refcount(r, c)
		if err != nil {
			return err
		}
		if v == 0 || s.wrong.at(c) {
			at := c << s.cb
			return s.corrupt(r, at, s.cs, "Preventing invalid free of cluster %s, whose refcount is wrong", hex(at))
		}
	}
	return nil
}
