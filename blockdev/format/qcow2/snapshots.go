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
	// flagsDue: copied flags are to be set when limbo has gone.
	flagsDue       bool // +checklocks:mu
	shownSnapshots atomic.Pointer[[]*types.SnapshotInfo]
}

var errNoSnapshot = errors.New("Can't find the snapshot")

// undoneError is an error after which everything is as it was.
type undoneError struct{ error }

func (e undoneError) Unwrap() error { return e.error }

// quietly does f with nothing in flight and everything flushed before and after.
func (s *snapshots) quietly(r *blk.Req, f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if err := s.sureOfAll(r); err != nil {
		return err
	}
	if err := s.flush(r); err != nil {
		return err
	}
	if s.hdr.Version >= 3 && s.hdr.IncompatibleFeatures&layout.IncompatDirty == 0 {
		if err := s.writeIncompat(r, s.hdr.IncompatibleFeatures|layout.IncompatDirty); err != nil {
			return err
		}
	}
	err := f()
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
func (s *snapshots) sureOfAll(r *blk.Req) error {
	if err := s.vetAll(r); err != nil || s.wrong.n == 0 {
		return err
	}
	at := s.wrong.first << s.cb
	return s.corrupt(r, at, s.cs, "Preventing a change of snapshots: the refcount of cluster %s is wrong", hex(at))
}

// CreateSnapshot implements graph.InternalSnapshotter.
func (s *snapshots) CreateSnapshot(r *blk.Req, name string, at time.Time, clock time.Duration) (id string, _ error) {
	if len(s.snaps) >= layout.MaxSnapshots {
		return "", errTooBig
	}
	sn := layout.Snapshot{
		ID: s.newID(), Name: name, L1Size: s.hdr.L1Size,
		DateSec: uint32(at.Unix()), DateNsec: uint32(at.Nanosecond()), VMClockNsec: uint64(clock),
		DiskSize: uint64(s.size.Load()), Icount: ^uint64(0),
	}
	do := func() error {
		if err := s.share(r, 1); err != nil {
			return err
		}
		r := patient(r) // what is left takes less than undoing it would
		if err := s.addSnapshot(r, &sn); err != nil {
			var unsure unsureError
			if errors.As(err, &unsure) {
				return err // its clusters may be leaked, but not given away
			}
			if e := s.share(r, -1); e != nil {
				s.warnf("Leaking the clusters of a snapshot that could not be made: %s", blk.ErrnoText(e))
				return err
			}
			return undoneError{err}
		}
		return nil
	}
	kept := s.keepsBack()
	err := s.quietly(r, do)
	if err != nil && kept && !s.hasID(sn.ID) && s.giveSpace(r, err) {
		err = s.quietly(r, do)
	}
	if err != nil && s.hasID(sn.ID) {
		// It was made, but not all that goes with it.
		if e := s.DeleteSnapshot(patient(r), sn.ID, name); e != nil {
			s.warnf("Snapshot '%s' stays, although making it has failed: %s", name, blk.ErrnoText(e))
		}
	}
	return sn.ID, err
}

func (s *snapshots) hasID(id string) bool {
	return slices.ContainsFunc(s.snaps, func(x layout.Snapshot) bool { return x.ID == id })
}

// newID is one more than the largest number that an ID begins with or, if that is the largest there
// is, the lowest number that is no ID. IDs are whatever the image says; of two that have the same,
// only the first can be named.
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
func (s *snapshots) share(r *blk.Req, d int) error {
	if err := s.vetL1(r, &s.l1); err != nil {
		return err
	}
	done, flags := 0, int64(0)
	err := s.eachCluster(r, &s.l1, func(c int64) error {
		err := s.addRef(r, c, d)
		if err == nil {
			done++
		}
		return err
	})
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
	undone := s.eachCluster(q, &s.l1, func(c int64) error {
		if done--; done < 0 {
			return errEnough
		}
		return s.addRef(q, c, -d)
	})
	if undone != nil && undone != errEnough {
		whole = false
		s.warnf("Leaking clusters: %s", blk.ErrnoText(undone))
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

var errEnough = errors.New("enough")

// fixFlags puts the copied flags right, of the L1 entries before behind (0: of all) and of what
// they refer to. It returns the entry behind the last one that it looked at.
func (s *flusher) fixFlags(r *blk.Req, behind int64) (int64, error) {
	c := &checker{counter: s.newCounter(r, &CheckResult{}), s: s, behind: behind}
	err := c.copiedFlags(true)
	return c.at, err
}

// lookEvery is after how many entries of a table the context of a request is looked at.
const lookEvery = 4096

// unsureError is an error after which nobody knows whether the image refers to what was written.
type unsureError struct{ error }

func (e unsureError) Unwrap() error { return e.error }

// DeleteSnapshot implements graph.InternalSnapshotter.
func (s *snapshots) DeleteSnapshot(r *blk.Req, id, name string) error {
	for i := range s.snaps {
		if s.snaps[i].ID == id && s.snaps[i].Name == name {
			return s.quietly(r, func() error { return s.dropSnapshot(r, i) })
		}
	}
	return errNoSnapshot
}

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
	var gone []span // of clusters
	err = s.eachCluster(r, &l1, func(c int64) error {
		if k := len(gone) - 1; k >= 0 && gone[k].last+1 == c {
			gone[k].last = c
		} else {
			gone = append(gone, span{c, c})
		}
		return nil
	})
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
func (s *snapshots) dropRefs(r *blk.Req, g span) {
	for c := g.first; c <= g.last; c++ {
		n, err := s.refcount(r, c)
		if err != nil || n < 2 || s.wrong.at(c) || s.addRef(r, c, -1) != nil {
			s.free(c<<s.cb, s.cs, discardSnapshot)
		}
	}
}

// publishSnapshots makes the internal snapshots known to queries.
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

var _ graph.InternalSnapshotter = (*Driver)(nil)
