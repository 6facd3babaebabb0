package meta

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"

	"qblockd/blockdev/drivertest"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// target makes and opens an image of m's size for a job to copy to. top: it backs on what m backs
// on. Nil if there is no place for one.
func (w *world) target(m *image, r *rand.Rand, top bool) (*image, error) {
	t := &image{
		slot: -1, format: types.BlockdevDriverQcow2, shape: randomShape(r), closed: true, data: make([]byte, len(m.data)),
	}
	for i, x := range w.images {
		if x == nil {
			t.slot = i
			break
		}
	}
	if t.slot < 0 {
		return nil, nil
	}
	if top {
		t.backing = m.backing
	} else if r.IntN(4) == 0 {
		t.format, t.shape = types.BlockdevDriverRaw, shape{cs: 512, align: 512}
	}
	opt := func() *types.BlockdevOptions { return w.options(t, r) }
	if t.format == types.BlockdevDriverRaw {
		w.images[t.slot] = t
		if err := w.makeFile(t, int64(len(t.data)), r, 512); err != nil {
			return nil, err
		}
	} else if err := w.createQcow2(t, r); err != nil {
		return nil, err
	}
	o := opt()
	if q, ok := o.U.(*types.BlockdevOptionsQcow2); ok {
		q.Backing = &types.BlockdevRefOrNull{Null: true}
		if top {
			q.Backing = &types.BlockdevRefOrNull{Reference: rig.Ptr(w.node(m.backing).Name())}
		}
	}
	if err := w.x.Nodes.Add(w.ctx, o); err != nil {
		return nil, err
	}
	t.closed, t.own = false, true
	return t, nil
}

// copyable tells whether a job can copy m, which may be written to meanwhile.
func (w *world) copyable(m *image) bool {
	if m.closed || !m.own || m.unknown || w.busy(m) || len(w.dependents(m, true)) > 0 {
		return false
	}
	for x := m.backing; x != nil; x = x.backing {
		if w.undefined(x) || x.guest != nil && x.canSet {
			return false
		}
	}
	return true
}

// backup starts a backup of m: to a new image, or of what a bitmap has recorded to the image that
// it was made with.
func (w *world) backup(m *image, o Op) error {
	if !w.copyable(m) {
		return nil
	}
	if err := w.joined(m); err != nil { // the point in time is to be known
		return err
	}
	r := rnd(o)
	for _, b := range m.bitmaps {
		if b.copy != nil && b.enabled && !m.ro && w.images[b.copy.slot] == b.copy && w.aloneOpen(b.copy) && r.IntN(3) != 0 {
			return w.incremental(m, b, r)
		}
	}
	top := m.backing != nil && w.node(m.backing) != nil && r.IntN(3) == 0
	t, err := w.target(m, r, top)
	if err != nil || t == nil {
		return err
	}
	j := w.newJob(r, m, t)
	a := w.backupArgs(m, t, j, r)
	if top {
		a.Sync = types.MirrorSyncModeTop
	}
	b := w.firstCopy(m, t, r)
	if b == nil {
		err = w.x.BlockJob.BlockdevBackup(w.ctx, a)
	} else {
		err = w.transaction(
			&types.TransactionAction{Type: types.TransactionActionKindBlockDirtyBitmapAdd, U: &types.BlockDirtyBitmapAddWrapper{Data: types.BlockDirtyBitmapAdd{
				Node: m.name(), Name: b.name, Persistent: &b.persistent, Granularity: &b.granularity}}},
			&types.TransactionAction{Type: types.TransactionActionKindBlockdevBackup, U: &types.BlockdevBackupWrapper{Data: *a}})
	}
	w.did("backup %s to %s as %s, %s, bitmap %v: %v", m.name(), t.name(), j.id, a.Sync, b != nil, err)
	if err != nil {
		return w.refused(j, t, err)
	}
	if b != nil {
		m.bitmaps = append(m.bitmaps, b)
	}
	return w.copying(m, t, j, b)
}

func (w *world) backupArgs(m, t *image, j *job, r *rand.Rand) *types.BlockdevBackup {
	onError := w.arm(j, t, drivertest.OpAny, r)
	if onError != nil {
		w.faults.tries.Store(5) // who waits for the same copy fails with it
	}
	a := &types.BlockdevBackup{
		OnTargetError: onError,
		JobID:         &j.id, Device: m.name(), Target: t.name(), Sync: types.MirrorSyncModeFull,
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	if r.IntN(2) == 0 {
		a.Speed = rig.Ptr(int64(1 + r.IntN(4<<20)))
	}
	return a
}

// firstCopy is the bitmap to be made with the copy t, or nil.
func (w *world) firstCopy(m, t *image, r *rand.Rand) *dirty {
	if m.ro || len(m.bitmaps) > 3 || r.IntN(2) == 0 {
		return nil
	}
	w.count++
	b := &dirty{name: fmt.Sprintf("b%d", w.count), granularity: 512 << r.IntN(8), enabled: true, since: bytes.Clone(m.data), copy: t}
	b.persistent = m.format == types.BlockdevDriverQcow2 && !m.shape.v2 && r.IntN(2) == 0
	return b
}

// copying takes over a backup that was begun: in the end t has what m has now.
func (w *world) copying(m, t *image, j *job, b *dirty) error {
	now := bytes.Clone(m.data)
	j.touched = []*image{t}
	j.done = func(_ *job, cancelled bool) error {
		t.data, t.unknown = now, cancelled
		if cancelled && b != nil {
			b.copy = nil
		}
		return errors.Join(w.linked(m), w.linked(t))
	}
	return w.begun(j)
}

// aloneOpen tells whether nobody but a job would use the open image t.
func (w *world) aloneOpen(t *image) bool {
	return !t.closed && t.own && !t.ro && !t.unknown && t.guest == nil && !w.busy(t) && len(w.dependents(t, false)) == 0
}

// incremental brings the copy that belongs to a bitmap up to date.
func (w *world) incremental(m *image, b *dirty, r *rand.Rand) error {
	if len(b.copy.data) != len(m.data) {
		return nil
	}
	if err := same(b.copy.data, b.since, 0); err != nil {
		return nil // somebody has written to it
	}
	t := b.copy
	j := w.newJob(r, m, t)
	a := w.backupArgs(m, t, j, r)
	a.Sync, a.Bitmap = types.MirrorSyncModeIncremental, &b.name
	err := w.x.BlockJob.BlockdevBackup(w.ctx, a)
	w.did("incremental backup %s to %s as %s, bitmap %s: %v", m.name(), t.name(), j.id, b.name, err)
	if err != nil {
		if err = w.refused(j, t, err); err == nil {
			b.copy = nil
		}
		return err
	}
	b.busy = true
	now := bytes.Clone(m.data)
	j.touched = []*image{t}
	j.done = func(_ *job, cancelled bool) error {
		b.busy = false
		if cancelled {
			t.unknown, b.copy = true, nil // what was copied is not clear; the bitmap has all again
		} else {
			t.data, b.since = now, bytes.Clone(now)
		}
		return errors.Join(w.linked(m), w.linked(t))
	}
	return w.begun(j)
}

// mirror starts a mirror of m to a new image, which takes its place in the end.
func (w *world) mirror(m *image, o Op) error {
	if !w.copyable(m) {
		return nil
	}
	r := rnd(o)
	top := m.backing != nil && w.node(m.backing) != nil && r.IntN(3) == 0
	t, err := w.target(m, r, top)
	if err != nil || t == nil {
		return err
	}
	j := w.newJob(r, m, t)
	j.pivots = true
	onError := w.arm(j, t, drivertest.OpAny, r)
	a := &types.BlockdevMirrorArgs{
		OnTargetError: onError,
		JobID:         &j.id, Device: m.name(), Target: t.name(), Sync: types.MirrorSyncModeFull,
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	if top {
		a.Sync = types.MirrorSyncModeTop
	}
	if r.IntN(2) == 0 {
		a.CopyMode = rig.Ptr(types.MirrorCopyModeWriteBlocking)
	}
	if r.IntN(3) == 0 {
		a.Speed = rig.Ptr(int64(1 + r.IntN(4<<20)))
	}
	if r.IntN(3) == 0 {
		a.Granularity = rig.Ptr(uint32(512) << r.IntN(10))
	}
	err = w.x.BlockJob.BlockdevMirror(w.ctx, a)
	w.did("mirror %s to %s as %s, %s, %v: %v", m.name(), t.name(), j.id, a.Sync, a.CopyMode != nil, err)
	if err != nil {
		return w.refused(j, t, err)
	}
	j.touched = []*image{t}
	j.done = func(j *job, cancelled bool) error {
		t.data, t.unknown = bytes.Clone(m.data), cancelled
		if !cancelled && j.completed {
			t.guest, t.canSet = m.guest, m.canSet
			m.guest, m.canSet = nil, false
			if t.ro = m.ro; j.fault != nil {
				// An image that could not be made read-only is none, and the job's work is done all the same.
				t.ro = w.node(t).ReadOnly()
			}
		}
		return errors.Join(w.linked(m), w.linked(t))
	}
	return w.begun(j)
}

// commit starts a commit: of what m has, or of an image below it, into one further down that nobody
// else uses.
func (w *world) commit(m *image, o Op) error {
	if !w.copyable(m) || len(w.dependents(m, false)) > 0 || m.backing == nil || m.format != types.BlockdevDriverQcow2 {
		return nil
	}
	r := rnd(o)
	chain := []*image{m}
	unused := func(x *image) bool {
		return len(w.dependents(x, false)) == 1 && x.guest == nil && !x.unknown && !w.busy(x)
	}
	for x := m.backing; x != nil && unused(x) && w.node(x) != nil; x = x.backing {
		chain = append(chain, x)
	}
	top := r.IntN(len(chain))
	if top+1 >= len(chain) {
		return nil
	}
	base := top + 1 + r.IntN(len(chain)-top-1)
	from, to := chain[top], chain[base]
	if top == 0 && (!to.own || len(to.data) > len(from.data)) || to.format != types.BlockdevDriverQcow2 && len(from.data)%4096 != 0 ||
		to.shape.v2 && len(to.data) < len(from.data) {
		return nil
	}
	if top == 0 && m.ro {
		return nil
	}
	j := w.newJob(r, chain...)
	j.pivots = top == 0
	j.drops = chain[top:base]
	j.touched = chain[max(top, 1):] // nobody else may use these
	onError := w.arm(j, to, drivertest.OpModify, r)
	a := &types.BlockCommitArgs{
		OnError: onError,
		JobID:   &j.id, Device: m.name(), BaseNode: rig.Ptr(w.node(to).Name()),
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	if top > 0 {
		a.TopNode = rig.Ptr(w.node(from).Name())
	}
	if r.IntN(2) == 0 {
		a.Speed = rig.Ptr(int64(1 + r.IntN(4<<20)))
	}
	err := w.x.BlockJob.BlockCommit(w.ctx, a)
	w.did("commit %s into %s under %s as %s: %v", from.name(), to.name(), m.name(), j.id, err)
	if err != nil {
		return w.refused(j, to, err)
	}
	wasRO := to.ro
	j.done = func(j *job, cancelled bool) error {
		if !cancelled && (!j.pivots || j.completed) {
			return w.committed(m, chain, top, base)
		}
		for _, x := range chain[top+1 : base+1] {
			x.unknown = true
		}
		to.ro = wasRO
		return w.linked(m)
	}
	return w.begun(j)
}

// committed notes that chain[top] went into chain[base], and deletes what was superfluous. The
// active image, m, is the first of the chain.
func (w *world) committed(m *image, chain []*image, top, base int) error {
	from, to := chain[top], chain[base]
	to.unknown = len(to.data) > len(from.data)
	to.data = resized(bytes.Clone(from.data), max(len(from.data), len(to.data)))
	to.grown()
	if top == 0 {
		to.guest, to.canSet = m.guest, m.canSet
		m.guest, m.canSet = nil, false
		to.ro = w.node(to).ReadOnly()
	} else {
		chain[top-1].backing = to
	}
	if err := w.dropAll(chain[top:base]); err != nil || top == 0 {
		return err
	}
	return w.linked(m)
}

// dropAll deletes images that a commit has made superfluous.
func (w *world) dropAll(l []*image) error {
	for _, x := range l {
		if x.own {
			if err := w.x.Nodes.Del(w.ctx, x.name()); err != nil {
				return err
			}
		}
	}
	for _, x := range l {
		w.images[x.slot], x.closed = nil, true
		if err := w.x.RemoveFile(x.file()); err != nil {
			return err
		}
	}
	return nil
}

// learn reads what a cancelled job has left.
func (w *world) learn(m *image) error {
	if w.busy(m) {
		return nil
	}
	n := w.node(m)
	if n == nil {
		return fmt.Errorf("%s has no node", m.name())
	}
	root, err := w.x.AttachRoot(w.ctx, n, true)
	if err != nil {
		return err
	}
	g := &rootGuest{root: root, w: w}
	m.data, m.unknown = make([]byte, n.Size()), false
	m.grown()
	return errors.Join(g.read(m.data, 0), g.close())
}

// reopen changes options of m's node.
func (w *world) reopen(m *image, o Op) error {
	if m.closed || !m.own || m.format != types.BlockdevDriverQcow2 || w.busy(m) {
		return nil
	}
	r := rnd(o)
	n := w.node(m)
	was := m.ro
	if m.guest == nil && len(w.dependents(m, true)) == 0 && r.IntN(3) == 0 {
		m.ro = !m.ro
	}
	opt := w.options(m, r)
	q := opt.U.(*types.BlockdevOptionsQcow2)
	q.File = types.BlockdevRef{Reference: rig.Ptr(n.File().Node().Name())}
	q.Backing = &types.BlockdevRefOrNull{Null: true}
	if b := n.Backing(); b != nil {
		q.Backing = &types.BlockdevRefOrNull{Reference: rig.Ptr(b.Node().Name())}
	}
	if opt.DetectZeroes != nil && *opt.DetectZeroes == types.BlockdevDetectZeroesOptionsUnmap {
		opt.Discard = rig.Ptr(types.BlockdevDiscardOptionsUnmap)
	}
	err := w.x.Nodes.Reopen([]*types.BlockdevOptions{opt}).Run(w.ctx)
	w.did("reopen %s, read-only %v (was %v),%s: %v", m.name(), m.ro, was, describe(opt), err)
	if err != nil {
		return err
	}
	return w.linked(m)
}

func (w *world) transaction(l ...*types.TransactionAction) error {
	return w.x.Transaction.Transaction(w.ctx, &types.TransactionArgs{Actions: l})
}
