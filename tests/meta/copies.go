package meta

import (
	"bytes"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// target makes and opens an image of m's size for a job to copy to. top: it backs on what m backs
// on. Nil if there is no place for one.
func (o *op) target(m *image, top bool) *image {
	t := &image{slot: o.free(), format: types.BlockdevDriverQcow2, shape: randomShape(o.r), closed: true,
		data: make([]byte, len(m.data))}
	if t.slot < 0 {
		return nil
	}
	if top {
		t.backing = m.backing
	} else if o.r.IntN(4) == 0 {
		t.format, t.shape = types.BlockdevDriverRaw, shape{cs: 512, align: 512}
	}
	if t.format == types.BlockdevDriverRaw {
		o.images[t.slot] = t
		o.makeFile(t, int64(len(t.data)), 512)
	} else {
		o.createQcow2(t)
	}
	opt := o.options(t)
	if q, ok := opt.U.(*types.BlockdevOptionsQcow2); ok {
		q.Backing = &types.BlockdevRefOrNull{Null: true}
		if top {
			q.Backing = backing(o.node(m.backing))
		}
	}
	trial.Must(o.x.Nodes.Add(o.ctx, opt))
	t.closed, t.own = false, true
	return t
}

// copyable tells whether a job can copy m, which may be written to meanwhile.
func (o *op) copyable(m *image) bool {
	if m.closed || !m.own || m.unknown || o.busy(m) || len(o.dependents(m, true)) > 0 {
		return false
	}
	for x := m.backing; x != nil; x = x.backing {
		if o.undefined(x) || x.guest != nil && x.canSet {
			return false
		}
	}
	return true
}

// backup starts a backup of m: to a new image, or of what a bitmap has recorded to the image that
// it was made with.
func (o *op) backup(m *image) {
	if !o.copyable(m) {
		return
	}
	o.joined(m) // the point in time is to be known
	for _, b := range m.bitmaps {
		if t := b.copy; t != nil && b.enabled && !m.ro && o.images[t.slot] == t && o.aloneOpen(t) && o.r.IntN(3) != 0 {
			o.incremental(m, b)
			return
		}
	}
	top := m.backing != nil && o.node(m.backing) != nil && o.r.IntN(3) == 0
	t := o.target(m, top)
	if t == nil {
		return
	}
	j := o.newJob(m, t)
	a := o.backupArgs(m, t, j)
	if top {
		a.Sync = types.MirrorSyncModeTop
	}
	b := o.firstCopy(m, t)
	var err error
	if b == nil {
		err = o.x.BlockJob.BlockdevBackup(o.ctx, a)
	} else {
		err = o.transaction(
			action(types.TransactionActionKindBlockDirtyBitmapAdd, &types.BlockDirtyBitmapAddWrapper{Data: *b.args(m.name())}),
			action(types.TransactionActionKindBlockdevBackup, &types.BlockdevBackupWrapper{Data: *a}))
	}
	o.did("backup %s to %s as %s, %s, bitmap %v: %v", m.name(), t.name(), j.id, a.Sync, b != nil, err)
	if err != nil {
		o.refused(j, t, err)
		return
	}
	if b != nil {
		m.bitmaps = append(m.bitmaps, b)
	}
	o.copying(m, t, j, b)
}

func (o *op) backupArgs(m, t *image, j *job) *types.BlockdevBackup {
	onError := o.arm(j, t, drivertest.OpAny)
	if onError != nil {
		o.faults.tries.Store(5) // who waits for the same copy fails with it
	}
	a := &types.BlockdevBackup{
		OnTargetError: onError,
		JobID:         &j.id, Device: m.name(), Target: t.name(), Sync: types.MirrorSyncModeFull,
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	a.Speed = o.speedLimit(2)
	return a
}

// firstCopy is the bitmap to be made with the copy t, or nil.
func (o *op) firstCopy(m, t *image) *dirty {
	if m.ro || len(m.bitmaps) > 3 || o.r.IntN(2) == 0 {
		return nil
	}
	b := o.newBitmap(m, 8)
	b.copy, b.persistent = t, m.keeps() && o.r.IntN(2) == 0
	return b
}

// copying takes over a backup that was begun: in the end t has what m has now.
func (w *world) copying(m, t *image, j *job, b *dirty) {
	now := bytes.Clone(m.data)
	j.touched = []*image{t}
	j.done = func(_ *job, cancelled bool) {
		t.data, t.unknown = now, cancelled
		if cancelled && b != nil {
			b.copy = nil
		}
		w.linked(m)
		w.linked(t)
	}
	w.begun(j)
}

// aloneOpen tells whether nobody but a job would use the open image t.
func (o *op) aloneOpen(t *image) bool {
	return !t.closed && t.own && !t.ro && !t.unknown && t.guest == nil && !o.busy(t) && len(o.dependents(t, false)) == 0
}

// incremental brings the copy that belongs to a bitmap up to date.
func (o *op) incremental(m *image, b *dirty) {
	if len(b.copy.data) != len(m.data) || !bytes.Equal(b.copy.data, b.since) {
		return // it was resized, or somebody has written to it
	}
	t := b.copy
	j := o.newJob(m, t)
	a := o.backupArgs(m, t, j)
	a.Sync, a.Bitmap = types.MirrorSyncModeIncremental, &b.name
	err := o.x.BlockJob.BlockdevBackup(o.ctx, a)
	o.did("incremental backup %s to %s as %s, bitmap %s: %v", m.name(), t.name(), j.id, b.name, err)
	if err != nil {
		o.refused(j, t, err)
		b.copy = nil
		return
	}
	b.busy = true
	now := bytes.Clone(m.data)
	j.touched = []*image{t}
	j.done = func(_ *job, cancelled bool) {
		b.busy = false
		if cancelled {
			t.unknown, b.copy = true, nil // what was copied is not clear; the bitmap has all again
		} else {
			t.data, b.since = now, bytes.Clone(now)
		}
		o.linked(m)
		o.linked(t)
	}
	o.begun(j)
}

// mirror starts a mirror of m to a new image, which takes its place in the end.
func (o *op) mirror(m *image) {
	if !o.copyable(m) {
		return
	}
	top := m.backing != nil && o.node(m.backing) != nil && o.r.IntN(3) == 0
	t := o.target(m, top)
	if t == nil {
		return
	}
	j := o.newJob(m, t)
	j.pivots = true
	onError := o.arm(j, t, drivertest.OpAny)
	a := &types.BlockdevMirrorArgs{
		OnTargetError: onError,
		JobID:         &j.id, Device: m.name(), Target: t.name(), Sync: types.MirrorSyncModeFull,
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	if top {
		a.Sync = types.MirrorSyncModeTop
	}
	if o.r.IntN(2) == 0 {
		a.CopyMode = rig.Ptr(types.MirrorCopyModeWriteBlocking)
	}
	a.Speed = o.speedLimit(3)
	if o.r.IntN(3) == 0 {
		a.Granularity = rig.Ptr(uint32(512) << o.r.IntN(10))
	}
	err := o.x.BlockJob.BlockdevMirror(o.ctx, a)
	o.did("mirror %s to %s as %s, %s, %v: %v", m.name(), t.name(), j.id, a.Sync, a.CopyMode != nil, err)
	if err != nil {
		o.refused(j, t, err)
		return
	}
	j.touched = []*image{t}
	j.done = func(j *job, cancelled bool) {
		t.data, t.unknown = bytes.Clone(m.data), cancelled
		if !cancelled && j.completed {
			m.passGuest(t)
			if t.ro = m.ro; j.fault != nil {
				// An image that could not be made read-only is none, and the job's work is done all the same.
				t.ro = o.node(t).ReadOnly()
			}
		}
		o.linked(m)
		o.linked(t)
	}
	o.begun(j)
}

// commit starts a commit: of what m has, or of an image below it, into one further down that nobody
// else uses.
func (o *op) commit(m *image) {
	if !o.copyable(m) || len(o.dependents(m, false)) > 0 || m.backing == nil || m.format != types.BlockdevDriverQcow2 {
		return
	}
	chain := []*image{m}
	unused := func(x *image) bool {
		return len(o.dependents(x, false)) == 1 && x.guest == nil && !x.unknown && !o.busy(x)
	}
	for x := m.backing; x != nil && unused(x) && o.node(x) != nil; x = x.backing {
		chain = append(chain, x)
	}
	top := o.r.IntN(len(chain))
	if top+1 >= len(chain) {
		return
	}
	base := top + 1 + o.r.IntN(len(chain)-top-1)
	from, to := chain[top], chain[base]
	switch {
	case top == 0 && (m.ro || !to.own || len(to.data) > len(from.data)):
		return
	case to.format != types.BlockdevDriverQcow2 && len(from.data)%4096 != 0:
		return
	case to.shape.v2 && len(to.data) < len(from.data):
		return
	}
	j := o.newJob(chain...)
	j.pivots = top == 0
	j.drops = chain[top:base]
	j.touched = chain[max(top, 1):] // nobody else may use these
	onError := o.arm(j, to, drivertest.OpModify)
	a := &types.BlockCommitArgs{
		OnError: onError,
		JobID:   &j.id, Device: m.name(), BaseNode: rig.Ptr(o.node(to).Name()),
		AutoFinalize: rig.Ptr(!j.manual), AutoDismiss: rig.Ptr(!j.keep),
	}
	if top > 0 {
		a.TopNode = rig.Ptr(o.node(from).Name())
	}
	a.Speed = o.speedLimit(2)
	err := o.x.BlockJob.BlockCommit(o.ctx, a)
	o.did("commit %s into %s under %s as %s: %v", from.name(), to.name(), m.name(), j.id, err)
	if err != nil {
		o.refused(j, to, err)
		return
	}
	wasRO := to.ro
	j.done = func(j *job, cancelled bool) {
		if !cancelled && (!j.pivots || j.completed) {
			o.committed(m, chain, top, base)
			return
		}
		for _, x := range chain[top+1 : base+1] {
			x.unknown = true
		}
		to.ro = wasRO
		o.linked(m)
	}
	o.begun(j)
}

// committed notes that chain[top] went into chain[base], and deletes what was superfluous. The
// active image, m, is the first of the chain.
func (w *world) committed(m *image, chain []*image, top, base int) {
	from, to := chain[top], chain[base]
	to.unknown = len(to.data) > len(from.data)
	to.data = trial.Resized(from.data, max(len(from.data), len(to.data)))
	to.grown()
	if top == 0 {
		m.passGuest(to)
		to.ro = w.node(to).ReadOnly()
	} else {
		chain[top-1].backing = to
	}
	w.dropAll(chain[top:base])
	if top > 0 {
		w.linked(m)
	}
}

// dropAll deletes images that a commit has made superfluous.
func (w *world) dropAll(l []*image) {
	for _, x := range l {
		if x.own {
			trial.Must(w.x.Nodes.Del(w.ctx, x.name()))
		}
	}
	for _, x := range l {
		w.images[x.slot], x.closed = nil, true
		trial.Must(w.x.RemoveFile(x.file()))
	}
}

// learn reads what a cancelled job has left.
func (w *world) learn(m *image) {
	if w.busy(m) {
		return
	}
	n := w.mustNode(m)
	m.data, m.unknown = make([]byte, n.Size()), false
	m.grown()
	w.reading(n, func(g guest) { trial.Must(g.read(m.data, 0)) })
}

// reopen changes options of m's node.
func (o *op) reopen(m *image) {
	if m.closed || !m.own || m.format != types.BlockdevDriverQcow2 || o.busy(m) {
		return
	}
	n := o.node(m)
	was := m.ro
	if m.guest == nil && len(o.dependents(m, true)) == 0 && o.r.IntN(3) == 0 {
		m.ro = !m.ro
	}
	opt := o.options(m)
	q := opt.U.(*types.BlockdevOptionsQcow2)
	q.File = types.BlockdevRef{Reference: rig.Ptr(n.File().Node().Name())}
	q.Backing = &types.BlockdevRefOrNull{Null: true}
	if b := n.Backing(); b != nil {
		q.Backing = backing(b.Node())
	}
	if opt.DetectZeroes != nil && *opt.DetectZeroes == types.BlockdevDetectZeroesOptionsUnmap {
		opt.Discard = rig.Ptr(types.BlockdevDiscardOptionsUnmap)
	}
	err := o.x.Nodes.Reopen([]*types.BlockdevOptions{opt}).Run(o.ctx)
	o.did("reopen %s, read-only %v (was %v),%s: %v", m.name(), m.ro, was, describe(opt), err)
	trial.Must(err)
	o.linked(m)
}

// backing is a reference to a node below.
func backing(n *graph.Node) *types.BlockdevRefOrNull {
	return &types.BlockdevRefOrNull{Reference: rig.Ptr(n.Name())}
}

func action(k types.TransactionActionKind, u any) *types.TransactionAction {
	return &types.TransactionAction{Type: k, U: u}
}

func (w *world) transaction(l ...*types.TransactionAction) error {
	return w.x.Transaction.Transaction(w.ctx, &types.TransactionArgs{Actions: l})
}
