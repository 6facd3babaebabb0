package qcow2

import (
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Repairing implements graph.Checker.
func (d *Driver) Repairing(on bool) {
	if on {
		d.repairing.Add(1)
	} else {
		d.repairing.Add(-1)
	}
}

// Repairs implements graph.Checker.
func (d *Driver) Repairs() bool { return d.repairing.Load() > 0 }

// CheckImage implements graph.Checker.
func (d *Driver) CheckImage(
	r *blk.Req, repair types.QblockdCheckRepair, told func(done, all int64),
) (*types.ImageCheck, error) {
	m := map[types.QblockdCheckRepair]mend{
		types.QblockdCheckRepairLeaks: mendLeaks, types.QblockdCheckRepairAll: mendAll,
	}[repair]
	res, err := d.image.checkImage(r, m, told)
	return res.shown((d.Size() + d.cs - 1) >> d.cb), err
}

// checkImage checks the image, of which no requests run. After a repair that has changed something
// it looks again: what it finds then is left.
func (s *image) checkImage(r *blk.Req, m mend, told func(done, all int64)) (*CheckResult, error) {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return &CheckResult{}, err
	}
	if s.options.XQblockdSnapshot != nil {
		return &CheckResult{}, blk.ErrNotSupported // it shows what is not active
	}
	if !s.readOnly {
		// What waits to be written, or to be given back, is no fault.
		if err := s.flush(r); err != nil {
			return &CheckResult{}, err
		}
		s.reap(r, false)
	}
	if m == mendNothing || m == mendLeaks && s.badTable != nil { // nobody knows what snapshots use
		return s.checkAndMend(r, mendNothing, told)
	}
	return s.repairImage(r, m, told)
}

// repairImage is checkImage that repairs. A survey that is under way would not know of what it
// changes: a whole count takes its place or, if something stays wrong, a new survey.
// +checklocks:s.mu
func (s *image) repairImage(r *blk.Req, m mend, told func(done, all int64)) (*CheckResult, error) {
	readOnly := s.readOnly
	s.readOnly = false
	s.endSurvey()
	s.wrong = wrong{}
	s.freeByte, s.unz = 0, unzipped{}
	res, err := s.mendAndLook(r, m, told)
	if s.readOnly = readOnly; !readOnly && (err != nil || res.Corruptions+res.Errors > 0) {
		s.startSurvey()
	}
	s.publish()
	s.publishBitmaps()
	return res, err
}

// mendAndLook mends, and looks again if that has changed something.
// +checklocks:s.mu
func (s *image) mendAndLook(r *blk.Req, m mend, told func(done, all int64)) (*CheckResult, error) {
	if err := s.dropStale(r); err != nil {
		return &CheckResult{}, err
	}
	sum := &CheckResult{}
	c := s.newCounter(r, &CheckResult{})
	if m == mendAll {
		err := s.countAll(c, told)
		if err == nil {
			sum.Messages = c.res.Messages
			sum.Fixed, err = s.scrub(c)
		}
		if err != nil {
			return sum, err
		}
	}
	// What snapshots refer to that lead nowhere does not count.
	s.lostSnaps = c.badSnaps
	err := s.mendMore(r, m, sum, told)
	s.lostSnaps = nil
	lost := len(c.badSnaps) + len(c.badBitmaps)
	if s.badTable != nil {
		lost++
	}
	if err == nil && lost > 0 && sum.Errors == 0 {
		if err = s.dropLost(c); err == nil {
			sum.Fixed += lost
			err = s.mendMore(r, m, sum, told)
		}
	}
	if err != nil || sum.Fixed+sum.LeaksFixed == 0 {
		return sum, err
	}
	return sum, s.mendMore(r, mendNothing, sum, told)
}

// mendMore adds to sum what another check has mended; what it has found takes the place of what was
// found before.
// +checklocks:s.mu
func (s *image) mendMore(r *blk.Req, m mend, sum *CheckResult, told func(done, all int64)) error {
	res, err := s.checkAndMend(r, m, told)
	fixed, leaks, said := sum.Fixed+res.Fixed, sum.LeaksFixed+res.LeaksFixed, sum.Messages
	if *sum = *res; len(said) == 0 {
		said = res.Messages
	}
	sum.Fixed, sum.LeaksFixed, sum.Messages = fixed, leaks, said
	return err
}

// shown is the result in the words of the schema; all is how many clusters the disk has.
func (c *CheckResult) shown(all int64) *types.ImageCheck {
	some := func(n int64) *int64 {
		if n == 0 {
			return nil
		}
		return &n
	}
	return &types.ImageCheck{
		CheckErrors: int64(c.Errors), ImageEndOffset: some(c.End),
		Corruptions: some(int64(c.Corruptions)), Leaks: some(int64(c.Leaks)),
		CorruptionsFixed: some(int64(c.Fixed)), LeaksFixed: some(int64(c.LeaksFixed)),
		TotalClusters: some(all), AllocatedClusters: some(c.Allocated), FragmentedClusters: some(c.Fragmented),
		CompressedClusters: some(c.Compressed), XQblockdFaults: c.Messages,
	}
}
