package meta

import (
	"bytes"
	"slices"

	"qblockd/graph/transaction"
	"qblockd/schema/types"
	"qblockd/tests/trial"
)

// dirty is a dirty bitmap: whatever is not now as it was is in it.
type dirty struct {
	name        string
	granularity uint32
	persistent  bool
	enabled     bool
	busy        bool   // a backup uses it
	since       []byte // the image when the bitmap was clean last
	until       []byte // the image when it was disabled; nil: it is enabled
	copy        *image // a copy of what was then; nil: none
}

// grown gives the bitmaps of m its size.
func (m *image) grown() {
	for _, b := range m.bitmaps {
		if len(b.since) != len(m.data) {
			b.since, b.copy = trial.Resized(b.since, len(m.data)), nil
			if b.until != nil {
				b.until = trial.Resized(b.until, len(m.data))
			}
		}
	}
}

// bitmap does something with a bitmap of m, and looks at all of them.
func (o *op) bitmap(m *image) {
	if m.closed || m.unknown || o.undefined(m) {
		return
	}
	o.joined(m)
	o.checkBitmaps(m)
	n := o.node(m)
	if n == nil || n.ReadOnly() || o.busy(m) {
		return
	}
	k := o.r.IntN(12)
	if len(m.bitmaps) == 0 || k < 3 && len(m.bitmaps) < 5 {
		o.addBitmap(m)
		return
	}
	i := o.r.IntN(len(m.bitmaps))
	b := m.bitmaps[i]
	a := &types.BlockDirtyBitmap{Node: n.Name(), Name: b.name}
	switch {
	case k < 5:
		o.did("remove bitmap %s", b.name)
		m.bitmaps = slices.Delete(m.bitmaps, i, i+1)
		o.act(o.x.Nodes.BitmapRemove(a))
	case k < 7:
		o.did("clear bitmap %s", b.name)
		b.since, b.copy = bytes.Clone(m.data), nil
		if b.until != nil {
			b.until = b.since
		}
		o.act(o.x.Nodes.BitmapClear(a))
	case k < 9:
		b.toggle(m)
		o.did("bitmap %s enabled: %v", b.name, b.enabled)
		o.act(o.x.Nodes.BitmapEnable(a, b.enabled))
	case k < 10:
		x := m.bitmaps[o.r.IntN(len(m.bitmaps))]
		o.did("merge bitmap %s into %s", x.name, b.name)
		o.act(o.x.Nodes.BitmapMerge(&types.BlockDirtyBitmapMerge{
			Node: n.Name(), Target: b.name, Bitmaps: []*types.BlockDirtyBitmapOrStr{{Local: &x.name}}}))
	default:
		o.undoneBitmaps(m, b, a)
	}
}

// newBitmap is one of m that is not there yet, with one of so many granularities.
func (o *op) newBitmap(m *image, most int) *dirty {
	return &dirty{name: o.unique("b"), granularity: 512 << o.r.IntN(most), enabled: true, since: bytes.Clone(m.data)}
}

// keeps tells whether m can have persistent bitmaps.
func (m *image) keeps() bool { return m.format == types.BlockdevDriverQcow2 && !m.shape.v2 }

// args are those of block-dirty-bitmap-add.
func (b *dirty) args(node string) *types.BlockDirtyBitmapAdd {
	return &types.BlockDirtyBitmapAdd{Node: node, Name: b.name, Persistent: &b.persistent, Granularity: &b.granularity}
}

func (o *op) addBitmap(m *image) {
	b := o.newBitmap(m, 10)
	b.persistent = m.keeps() && o.r.IntN(3) != 0
	o.did("add bitmap %s to %s, granularity %d, persistent %v", b.name, m.name(), b.granularity, b.persistent)
	m.bitmaps = append(m.bitmaps, b)
	o.act(o.x.Nodes.BitmapAdd(b.args(o.node(m).Name())))
}

// toggle enables b, a bitmap of m, or disables it.
func (b *dirty) toggle(m *image) {
	if b.enabled = !b.enabled; !b.enabled {
		b.until = bytes.Clone(m.data)
		return
	}
	for i := range b.until { // what has changed meanwhile is not in it
		if b.until[i] != m.data[i] {
			b.since[i] = m.data[i]
		}
	}
	b.until, b.copy = nil, nil
}

// undoneBitmaps runs a transaction that fails: all of it is undone.
func (o *op) undoneBitmaps(m *image, b *dirty, a *types.BlockDirtyBitmap) {
	o.did("transaction on bitmap %s that fails", b.name)
	never := types.BlockDirtyBitmapAdd{Node: a.Node, Name: "never", Persistent: &b.persistent}
	err := o.transaction(
		action(types.TransactionActionKindBlockDirtyBitmapClear, &types.BlockDirtyBitmapWrapper{Data: *a}),
		action(types.TransactionActionKindBlockDirtyBitmapAdd, &types.BlockDirtyBitmapAddWrapper{Data: never}),
		action(types.TransactionActionKindBlockDirtyBitmapRemove, &types.BlockDirtyBitmapWrapper{Data: *a}),
		action(types.TransactionActionKindAbort, &types.AbortWrapper{}))
	if err == nil {
		trial.Fail("the transaction succeeded")
	}
	if o.node(m).Bitmaps().Find("never") != nil {
		trial.Fail("a bitmap is left of a transaction that failed")
	}
	o.checkBitmaps(m)
}

func (w *world) act(a transaction.Action) { trial.Must(transaction.Run(w.ctx, w.x.Graph, a)) }

// checkBitmaps looks whether the bitmaps of m are there and have what they have to.
func (w *world) checkBitmaps(m *image) {
	n := w.node(m)
	if n == nil {
		return
	}
	for _, b := range m.bitmaps {
		d := n.Bitmaps().Find(b.name)
		switch {
		case d == nil:
			trial.Fail("bitmap %s of %s is gone", b.name, m.name())
		case d.Inconsistent():
			trial.Fail("bitmap %s is inconsistent", b.name)
		case d.Enabled() != b.enabled:
			trial.Fail("bitmap %s is enabled: %v", b.name, d.Enabled())
		case b.busy:
			continue
		}
		now := m.data
		if b.until != nil {
			now = b.until
		}
		bits := d.Recorded()
		for at := 0; at < len(now); at += 512 {
			end := min(at+512, len(now))
			if !bytes.Equal(now[at:end], b.since[at:end]) && !bits.Get(int64(at)) {
				trial.Fail("bitmap %s has missed a change at %d", b.name, at)
			}
		}
	}
}
