package meta

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"

	"qblockd/graph/transaction"
	"qblockd/schema/types"
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
			b.since, b.until, b.copy = resized(b.since, len(m.data)), resized(b.until, len(m.data)), nil
		}
	}
}

// bitmap does something with a bitmap of m, and looks at all of them.
func (w *world) bitmap(m *image, o Op) error {
	if m.closed || m.unknown || w.undefined(m) {
		return nil
	}
	if err := w.joined(m); err != nil {
		return err
	}
	if err := w.checkBitmaps(m); err != nil {
		return err
	}
	n := w.node(m)
	if n == nil || n.ReadOnly() || w.busy(m) {
		return nil
	}
	r := rnd(o)
	k := r.IntN(12)
	if len(m.bitmaps) == 0 || k < 3 && len(m.bitmaps) < 5 {
		return w.addBitmap(m, r)
	}
	i := r.IntN(len(m.bitmaps))
	b := m.bitmaps[i]
	a := &types.BlockDirtyBitmap{Node: n.Name(), Name: b.name}
	switch {
	case k < 5:
		w.did("remove bitmap %s", b.name)
		m.bitmaps = slices.Delete(m.bitmaps, i, i+1)
		return w.act(w.x.Nodes.BitmapRemove(a))
	case k < 7:
		w.did("clear bitmap %s", b.name)
		b.since, b.copy = bytes.Clone(m.data), nil
		if b.until != nil {
			b.until = b.since
		}
		return w.act(w.x.Nodes.BitmapClear(a))
	case k < 9:
		b.toggle(m)
		w.did("bitmap %s enabled: %v", b.name, b.enabled)
		return w.act(w.x.Nodes.BitmapEnable(a, b.enabled))
	case k < 10:
		x := m.bitmaps[r.IntN(len(m.bitmaps))]
		w.did("merge bitmap %s into %s", x.name, b.name)
		return w.act(w.x.Nodes.BitmapMerge(&types.BlockDirtyBitmapMerge{
			Node: n.Name(), Target: b.name, Bitmaps: []*types.BlockDirtyBitmapOrStr{{Local: &x.name}}}))
	default:
		return w.undoneBitmaps(m, b, a)
	}
}

func (w *world) addBitmap(m *image, r *rand.Rand) error {
	w.count++
	b := &dirty{name: fmt.Sprintf("b%d", w.count), granularity: 512 << r.IntN(10), enabled: true, since: bytes.Clone(m.data)}
	b.persistent = m.format == types.BlockdevDriverQcow2 && !m.shape.v2 && r.IntN(3) != 0
	w.did("add bitmap %s to %s, granularity %d, persistent %v", b.name, m.name(), b.granularity, b.persistent)
	m.bitmaps = append(m.bitmaps, b)
	return w.act(w.x.Nodes.BitmapAdd(&types.BlockDirtyBitmapAdd{
		Node: w.node(m).Name(), Name: b.name, Persistent: &b.persistent, Granularity: &b.granularity}))
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
func (w *world) undoneBitmaps(m *image, b *dirty, a *types.BlockDirtyBitmap) error {
	w.did("transaction on bitmap %s that fails", b.name)
	never := types.BlockDirtyBitmapAdd{Node: a.Node, Name: "never", Persistent: &b.persistent}
	err := w.transaction(
		&types.TransactionAction{
			Type: types.TransactionActionKindBlockDirtyBitmapClear, U: &types.BlockDirtyBitmapWrapper{Data: *a}},
		&types.TransactionAction{
			Type: types.TransactionActionKindBlockDirtyBitmapAdd, U: &types.BlockDirtyBitmapAddWrapper{Data: never}},
		&types.TransactionAction{
			Type: types.TransactionActionKindBlockDirtyBitmapRemove, U: &types.BlockDirtyBitmapWrapper{Data: *a}},
		&types.TransactionAction{Type: types.TransactionActionKindAbort, U: &types.AbortWrapper{}})
	if err == nil {
		return fmt.Errorf("the transaction succeeded")
	}
	if w.node(m).DirtyBitmap("never") != nil {
		return fmt.Errorf("a bitmap is left of a transaction that failed")
	}
	return w.checkBitmaps(m)
}

func (w *world) act(a transaction.Action) error { return transaction.Run(w.ctx, w.x.Graph, a) }

// checkBitmaps looks whether the bitmaps of m are there and have what they have to.
func (w *world) checkBitmaps(m *image) error {
	n := w.node(m)
	if n == nil {
		return nil
	}
	for _, b := range m.bitmaps {
		d := n.DirtyBitmap(b.name)
		switch {
		case d == nil:
			return fmt.Errorf("bitmap %s of %s is gone", b.name, m.name())
		case d.Inconsistent():
			return fmt.Errorf("bitmap %s is inconsistent", b.name)
		case d.Enabled() != b.enabled:
			return fmt.Errorf("bitmap %s is enabled: %v", b.name, d.Enabled())
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
				return fmt.Errorf("bitmap %s has missed a change at %d", b.name, at)
			}
		}
	}
	return nil
}
