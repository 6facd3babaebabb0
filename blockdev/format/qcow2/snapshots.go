package qcow2

import (
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Internal snapshots. A snapshot is a copy of the L1 table. It shares L2 tables and clusters with
// the active tables: each counts one reference more, and the entries of the active tables lack the
// copied flag, so what is shared is not written in place.
//
//	create:  refcounts up, flags off -> | L1 copy, table of snapshots -> | header
//	delete:  table of snapshots -> | header -> | refcounts down -> | flags on
//
// Both end with the context of their request, and have changed nothing then. After a crash in
// between, clusters are leaked at worst. (In images of version 3 the dirty bit is set meanwhile, so
// that the next one to write repairs that. Version 2 has none: refcounts may be up where flags are
// still on. qemu-img check calls that an error and repairs it; it costs no data, as nothing is
// shared yet.) The node is held quiet: no requests run.

// snapshots are the internal snapshots. Their methods need mu, exported ones take it.
type snapshots struct {
	flusher

	snaps []layout.Snapshot // +checklocks:mu
	// lostSnaps are snapshots, by index, that a repair is about to drop.
	lostSnaps map[int]bool // +checklocks:mu
	// flagsDue: copied flags are to be set when limbo has gone.
	flagsDue       bool // +checklocks:mu
	shownSnapshots atomic.Pointer[[]*types.SnapshotInfo]
}

var errNoSnapshot = errors.New("Can't find the snapshot")

// undoneError is an error after which everything is as it was.
type undoneError struct{ error }

func (e undoneError) Unwrap() error { return e.error }

// beginChange comes before a change of snapshots: nothing is in flight and everything is flushed.
// +checklocks:s.mu
func (s *snapshots) beginChange(r *blk.Req) error {
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.sureOfAll(r); err != nil {
		return err
	}
	if err := s.flush(r); err != nil {
		return err
	}
	if s.version >= 3 && s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
		if err := s.writeIncompat(r, s.hdr.IncompatibleFeatures|layout.IncompatDirty); err != nil {
			return err
		}
	}
	return nil
}

// endChange comes after beginChange and a change that has ended with err: everything is flushed.
// +checklocks:s.mu
func (s *snapshots) endChange(r *blk.Req, err error) error {
	var undone undoneError
	whole := err == nil || errors.As(err, &undone)
	r = patient(r)
	if e := s.flush(r); e != nil {
		whole = false
		if err == nil {
			err = e
		}
	}
	s.flagsDue = s.flagsDue || !whole // what has failed half-way is put right on closing
	if !s.flagsDue {
		if e := s.markClean(r); err == nil {
			err = e
		}
	}
	s.publishSnapshots()
	return err
}

// sureOfAll is called before what is shared changes as a whole: all refcounts must be right.
// +checklocks:s.mu
func (s *snapshots) sureOfAll(r *blk.Req) error {
	if err := s.vetAll(r); err != nil || s.wrong.n == 0 {
		return err
	}
	at := s.wrong.first << s.cb
	return s.corrupt(r, at, s.cs, "Preventing a change of snapshots: the refcount of cluster %s is wrong", hex(at))
}

// CreateSnapshot implements graph.InternalSnapshotter.
func (s *snapshots) CreateSnapshot(r *blk.Req, name string, at time.Time, clock time.Duration) (id string, _ error) {
	sn := layout.Snapshot{
		Name: name, DateSec: uint32(at.Unix()), DateNsec: uint32(at.Nanosecond()), VMClockNsec: uint64(clock),
		Icount: ^uint64(0),
	}
	kept := s.keepsBack()
	made, err := s.createSnapshot(r, &sn)
	if err != nil && kept && !made && s.giveSpace(r, err) {
		made, err = s.createSnapshot(r, &sn)
	}
	if err != nil && made {
		if e := s.DeleteSnapshot(patient(r), sn.ID, name); e != nil {
			s.warnf("Snapshot '%s' stays, although making it has failed: %s", name, blk.ErrnoText(e))
		}
	}
	return sn.ID, err
}

// createSnapshot makes sn, which has its name and times. made tells that the image has it then,
// also if something that goes with it has failed.
func (s *snapshots) createSnapshot(r *blk.Req, sn *layout.Snapshot) (made bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.snaps) >= layout.MaxSnapshots {
		return false, errTooBig
	}
	sn.ID, sn.L1Size, sn.DiskSize = s.newID(), s.hdr.L1Size, uint64(s.size.Load())
	if err := s.beginChange(r); err != nil {
		return false, err
	}
	err = s.endChange(r, s.shareAll(r, sn))
	return slices.ContainsFunc(s.snaps, func(x layout.Snapshot) bool { return x.ID == sn.ID }), err
}

// shareAll makes sn refer to all that the active L1 table refers to.
// +checklocks:s.mu
func (s *snapshots) shareAll(r *blk.Req, sn *layout.Snapshot) error {
	if err := s.share(r, 1); err != nil {
		return err
	}
	r = patient(r) // what is left takes less than undoing it would
	err := s.addSnapshot(r, sn)
	var unsure unsureError
	if err == nil || errors.As(err, &unsure) {
		return err // if nobody knows, its clusters may be leaked, but not given away
	}
	if e := s.share(r, -1); e != nil {
		s.warnf("Leaking the clusters of a snapshot that could not be made: %s", blk.ErrnoText(e))
		return err
	}
	return undoneError{err}
}

// newID is one more than the largest number that an ID begins with or, if that is the largest there
// is, the lowest number that is no ID. IDs are whatever the image says; of two that have the same,
// only the first can be named.
// +checklocks:s.mu
func (s *snapshots) newID() string {
	most := uint64(0)
	for i := range s.snaps {
		id := s.snaps[i].ID
		digits := len(id) - len(strings.TrimLeft(id, "0123456789"))
		n, _ := strconv.ParseUint(id[:digits], 10, 64) // the largest there is, if it is larger
		most = max(most, n)
	}
	if most < math.MaxUint64 {
		return strconv.FormatUint(most+1, 10)
	}
	taken := make(map[string]struct{}, len(s.snaps))
	for i := range s.snaps {
		taken[s.snaps[i].ID] = struct{}{}
	}
	for n := uint64(1); ; n++ {
		id := strconv.FormatUint(n, 10)
		if _, ok := taken[id]; !ok {
			return id
		}
	}
}

// share changes the refcounts of all that the active L1 table refers to by d, and puts the copied
// flags right. If it fails, nothing has changed but flags that were wrong. It ends with the context
// of r; undoing takes no longer than what was done.
// +checklocks:s.mu
func (s *snapshots) share(r *blk.Req, d int) error {
	if err := s.vetL1(r, &s.l1); err != nil {
		return err
	}
	flags := int64(0)
	done, err := s.addRefs(r, &s.l1, d, math.MaxInt)
	if err == nil {
		flags, err = s.fixFlags(r, 0)
	}
	if err == nil {
		err = s.flush(r)
	}
	if err == nil {
		return nil
	}
	q, whole := patient(r), true
	if _, e := s.addRefs(q, &s.l1, -d, done); e != nil {
		whole = false
		s.warnf("Leaking clusters: %s", blk.ErrnoText(e))
	}
	if flags > 0 {
		if _, e := s.fixFlags(q, flags); e != nil {
			whole = false
			s.warnf("The flags of clusters that are not shared stay wrong: %s", blk.ErrnoText(e))
		}
	}
	if !whole {
		return err
	}
	return undoneError{err}
}

// addRefs changes the refcounts of the first most clusters that l1 refers to by d. It tells how
// many it has changed, and ends with the context of r.
// +checklocks:s.mu
func (s *snapshots) addRefs(r *blk.Req, l1 *entries, d, most int) (done int, err error) {
	var list []int64
	for i, e := l1.next(0); e != 0 && done < most; i, e = l1.next(i + 1) {
		if list, err = s.clustersOf(r, e, list[:0]); err != nil {
			return done, err
		}
		for _, c := range list[:min(len(list), most-done)] {
			if done%lookEvery == 0 {
				err = ended(r)
			}
			if err == nil {
				err = s.addRef(r, c, d)
			}
			if err != nil {
				return done, err
			}
			done++
		}
	}
	return done, nil
}

// fixFlags puts the copied flags right, of the L1 entries before behind (0: of all) and of what
// they refer to. It returns the entry behind the last one that it looked at.
// +checklocks:s.mu
func (s *flusher) fixFlags(r *blk.Req, behind int64) (int64, error) {
	return s.copiedFlags(s.newCounter(r, &CheckResult{}), true, behind)
}

// lookEvery is after how many entries of a table the context of a request is looked at.
const lookEvery = 4096

// unsureError is an error after which nobody knows whether the image refers to what was written.
type unsureError struct{ error }

func (e unsureError) Unwrap() error { return e.error }

// DeleteSnapshot implements graph.InternalSnapshotter.
func (s *snapshots) DeleteSnapshot(r *blk.Req, id, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.snaps, func(x layout.Snapshot) bool { return x.ID == id && x.Name == name })
	if i < 0 {
		return errNoSnapshot
	}
	if err := s.beginChange(r); err != nil {
		return err
	}
	return s.endChange(r, s.dropSnapshot(r, i))
}

// +checklocks:s.mu
func (s *snapshots) dropSnapshot(r *blk.Req, i int) error {
	sn := s.snaps[i]
	if err := s.checkL1(&sn); err != nil {
		return undoneError{err}
	}
	// All that takes long comes before anything changes, so that it can end with the context.
	l1, err := s.readTable(r, int64(sn.L1TableOffset), int64(sn.L1Size))
	if err != nil {
		return undoneError{err}
	}
	if err := s.vetL1(r, &l1); err != nil {
		return err
	}
	gone, err := s.allOf(r, &l1)
	if err != nil {
		return undoneError{err}
	}
	q := patient(r)
	defer s.giveBack(q)
	if err := s.writeSnapshots(q, append(s.snaps[:i:i], s.snaps[i+1:]...)); err != nil {
		return err
	}
	// The image does not refer to it any more.
	for _, g := range gone {
		s.dropRefs(q, g)
	}
	if sn.L1Size > 0 {
		s.free(int64(sn.L1TableOffset), int64(sn.L1Size)*8, discardSnapshot)
	}
	s.quarantine.turn()
	err = s.flush(q)
	s.reap(q, false)
	if _, e := s.fixFlags(r, 0); e != nil && ended(r) != nil {
		s.flagsDue = true // the snapshot has gone; this can wait
	} else if err == nil {
		err = e
	}
	return err
}

// dropRefs takes back one reference on each cluster of g, to which the image on disk does not refer
// any more. What others refer to as well stays where it is, so those who read it are not waited
// for: that may take long, and until the refcounts are right the copied flags are wrong.
// +checklocks:s.mu
func (s *snapshots) dropRefs(r *blk.Req, g span) {
	for c := g.off; c < g.end; c++ {
		n, err := s.refcount(r, c)
		if err != nil || n < 2 || s.wrong.at(c) || s.addRef(r, c, -1) != nil {
			s.free(c<<s.cb, s.cs, discardSnapshot)
		}
	}
}

// publishSnapshots makes the internal snapshots known to queries.
// +checklocks:s.mu
func (s *snapshots) publishSnapshots() {
	var out []*types.SnapshotInfo
	for i := range s.snaps {
		n := &s.snaps[i]
		x := &types.SnapshotInfo{
			ID:          n.ID,
			Name:        n.Name,
			VmStateSize: int64(n.VMStateSize),
			DateSec:     int64(n.DateSec),
			DateNsec:    int64(n.DateNsec),
			VmClockSec:  int64(n.VMClockNsec / 1e9),
			VmClockNsec: int64(n.VMClockNsec % 1e9),
		}
		if n.Icount != ^uint64(0) {
			c := int64(n.Icount)
			x.Icount = &c
		}
		out = append(out, x)
	}
	s.shownSnapshots.Store(&out)
	s.tellChanged()
}

// Snapshots implements graph.InternalSnapshotter.
func (d *Driver) Snapshots() []*types.SnapshotInfo { return *d.shownSnapshots.Load() }

// Listless tells that there can be no snapshots: they would have to share clusters of another file.
func (d *Driver) Listless() bool { return d.geo.External }

var _ graph.SnapshotApplier = (*Driver)(nil)
