package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// The bodies of the block-dirty-bitmap- commands, as steps of a transaction. They change bitmaps in
// Prepare, so that later steps find them as these leave them, and take that back in Abort, so that
// no write that happened meanwhile is missing.

// bitmaps makes these steps.
type bitmaps struct {
	finder
	log *slog.Logger
}

// BitmapStep is one of these steps.
type BitmapStep struct {
	transaction.Noop
	node    string   // of the bitmap
	quiet   bool     // the node is held quiet
	others  []string // nodes whose bitmaps it reads
	g       *graph.Graph
	prepare func(ctx context.Context, tx *graph.Tx) error
	undo    func() // what Abort does; nil: nothing was done
	finish  func() // what Commit does
}

var _ interface {
	transaction.Action
	transaction.Holder
	transaction.Quiescer
} = (*BitmapStep)(nil)

// Nodes implements transaction.Action.
func (s *BitmapStep) Nodes() []*graph.Node {
	if n := s.g.Node(s.node); s.quiet && n != nil {
		return []*graph.Node{n}
	}
	return nil
}

// Holds implements transaction.Holder.
func (s *BitmapStep) Holds() (l []*graph.Node) {
	for _, name := range append([]string{s.node}, s.others...) {
		if n := s.g.Node(name); n != nil {
			l = append(l, n)
		}
	}
	return l
}

// Quiesces implements transaction.Quiescer.
func (*BitmapStep) Quiesces() []*graph.Node { return nil }

// Prepare implements transaction.Action.
func (s *BitmapStep) Prepare(ctx context.Context, tx *graph.Tx) error {
	s.undo, s.finish = nil, nil
	return s.prepare(ctx, tx)
}

// Commit implements transaction.Action.
func (s *BitmapStep) Commit() {
	if s.finish != nil {
		s.finish()
	}
}

// Abort implements transaction.Action.
func (s *BitmapStep) Abort() {
	if s.undo != nil {
		s.undo()
	}
}

// BitmapAdd makes the step block-dirty-bitmap-add.
func (bs bitmaps) BitmapAdd(a *types.BlockDirtyBitmapAdd) *BitmapStep {
	persistent := types.Or(a.Persistent, false)
	s := &BitmapStep{g: bs.g, node: a.Node, quiet: persistent}
	s.prepare = func(ctx context.Context, tx *graph.Tx) error {
		if a.Name == "" {
			return errors.New("Bitmap name cannot be empty")
		}
		n, err := bs.LookupIn(tx, a.Node)
		if err != nil {
			return err
		}
		spec := graph.DirtyBitmapSpec{Name: a.Name, Disabled: types.Or(a.Disabled, false), Persistent: persistent}
		if g := a.Granularity; g != nil {
			if *g < graph.MinGranularity || *g&(*g-1) != 0 {
				return errors.New("Granularity must be power of 2 and at least 512")
			}
			spec.Granularity = int64(*g)
		}
		if persistent {
			if err := canStore(n, &spec); err != nil {
				return err
			}
		}
		d, err := n.Bitmaps().New(spec)
		if err != nil {
			return err
		}
		s.undo = d.Remove
		if !persistent {
			return nil
		}
		s.undo = func() { bs.forget(d) }
		return hold(ctx, d)
	}
	return s
}

// inImage does something to a persistent bitmap in the image that keeps it.
func inImage(d *graph.DirtyBitmap, do func(store graph.BitmapStore) error) error {
	store, ok := d.Node().Driver().(graph.BitmapStore)
	if !ok || !d.Persistent() {
		return nil
	}
	d.Node().MustHold()
	return d.Node().Guarded(func() error { return do(store) })
}

// hold makes the image hold a persistent bitmap, whatever happens to the program.
func hold(ctx context.Context, d *graph.DirtyBitmap) error {
	err := inImage(d, func(s graph.BitmapStore) error { return s.HoldBitmap(&blk.Req{Ctx: ctx}, d.Name()) })
	if err != nil {
		return fmt.Errorf("Can't store bitmap '%s' in '%s': %w", d.Name(), d.Node().Name(), err)
	}
	return nil
}

// forget removes a bitmap, from the image, too.
func (bs bitmaps) forget(d *graph.DirtyBitmap) {
	d.Remove()
	r := &blk.Req{Ctx: context.Background()}
	if err := inImage(d, func(s graph.BitmapStore) error { return s.RemoveBitmap(r, d.Name()) }); err != nil {
		bs.warn("a bitmap stays in its image for the time being", d, err)
	}
}

func (bs bitmaps) warn(what string, d *graph.DirtyBitmap, err error) {
	bs.log.Warn(what, "node", d.Node().Name(), "bitmap", d.Name(), "error", err)
}

// canStore tells why n cannot keep a persistent bitmap, in QEMU's words.
func canStore(n *graph.Node, spec *graph.DirtyBitmapSpec) error {
	store, ok := n.Driver().(graph.BitmapStore)
	if !ok {
		return fmt.Errorf("Can't store persistent bitmaps to %s: Operation not supported", n.Name())
	}
	others := 0
	for _, d := range n.Bitmaps().All() {
		if d.Persistent() {
			others++
		}
	}
	g := spec.Granularity
	if g == 0 {
		g = n.Bitmaps().DefaultGranularity()
	}
	if n.Bitmaps().Find(spec.Name) != nil {
		return nil // which is told next
	}
	if err := store.CanStoreBitmap(spec.Name, g, others); err != nil {
		return fmt.Errorf("Can't make bitmap '%s' persistent in '%s': %w", spec.Name, n.Name(), err)
	}
	return nil
}

// onBitmap makes a step that does something with a bitmap that can be used that way.
func (bs bitmaps) onBitmap(
	a *types.BlockDirtyBitmap, use graph.BitmapUse,
	do func(ctx context.Context, s *BitmapStep, d *graph.DirtyBitmap) error,
) *BitmapStep {
	s := &BitmapStep{g: bs.g, node: a.Node}
	s.prepare = func(ctx context.Context, tx *graph.Tx) error {
		d, err := tx.FindDirtyBitmap(a.Node, a.Name)
		if err == nil {
			err = d.Check(use)
		}
		if err != nil {
			return err
		}
		return do(ctx, s, d)
	}
	return s
}

// BitmapRemove makes the step block-dirty-bitmap-remove. The bitmap goes on recording until Commit,
// so that it has missed nothing if it stays. One in the image goes from there, too; if that fails
// it stays there as one that cannot be trusted, until the image is closed.
func (bs bitmaps) BitmapRemove(a *types.BlockDirtyBitmap) *BitmapStep {
	s := bs.onBitmap(a, graph.BitmapRemove, func(ctx context.Context, s *BitmapStep, d *graph.DirtyBitmap) error {
		d.SetBusy(true)
		d.SetPending(graph.PendingRemove)
		s.undo = func() {
			d.SetPending(graph.PendingNone)
			d.SetBusy(false)
		}
		s.finish = func() { bs.forget(d) }
		return nil
	})
	s.quiet = true // as the image is written to
	return s
}

// BitmapClear makes the step block-dirty-bitmap-clear.
func (bs bitmaps) BitmapClear(a *types.BlockDirtyBitmap) *BitmapStep {
	return bs.onBitmap(a, graph.BitmapChange, func(ctx context.Context, s *BitmapStep, d *graph.DirtyBitmap) error {
		old := d.Take()
		s.undo = func() { d.Bits().Merge(old) }
		return nil
	})
}

// BitmapEnable makes the step block-dirty-bitmap-enable or -disable. One that is disabled goes on
// recording until Commit, so that it has missed nothing if it stays enabled. The node is quiet
// while one is enabled: what the image has of it must be more than what writes under way add.
func (bs bitmaps) BitmapEnable(a *types.BlockDirtyBitmap, enable bool) *BitmapStep {
	s := bs.onBitmap(a, graph.BitmapRead, func(ctx context.Context, s *BitmapStep, d *graph.DirtyBitmap) error {
		switch {
		case d.Enabled() == enable:
		case enable:
			d.Enable()
			s.undo = d.Disable
			return hold(ctx, d)
		default:
			d.SetPending(graph.PendingDisable)
			s.undo = func() { d.SetPending(graph.PendingNone) }
			s.finish = func() {
				d.Disable()
				d.SetPending(graph.PendingNone)
				if err := hold(context.WithoutCancel(ctx), d); err != nil {
					bs.warn("a bitmap will record again if the program is killed", d, err)
				}
			}
		}
		return nil
	})
	s.quiet = enable
	return s
}

// BitmapMerge makes the step block-dirty-bitmap-merge. The node is quiet, as the image has to have
// what is merged before a write finds it dirty already.
func (bs bitmaps) BitmapMerge(a *types.BlockDirtyBitmapMerge) *BitmapStep {
	var others []string
	for _, b := range a.Bitmaps {
		if b.External != nil {
			others = append(others, b.External.Node)
		}
	}
	s := &BitmapStep{g: bs.g, node: a.Node, quiet: true, others: others}
	s.prepare = func(ctx context.Context, tx *graph.Tx) error {
		d, err := tx.FindDirtyBitmap(a.Node, a.Target)
		if err != nil {
			return err
		}
		sum, err := sumBitmaps(tx, d, a.Bitmaps)
		if err == nil {
			err = d.Check(graph.BitmapChange)
		}
		if err != nil {
			return err
		}
		s.undo, s.finish = d.Merge(sum)
		return hold(ctx, d)
	}
	return s
}

// sumBitmaps merges bitmaps in the granularity of d, which stays as it is. It may be one of them,
// and is not to be changed.
func sumBitmaps(tx *graph.Tx, d *graph.DirtyBitmap, from []*types.BlockDirtyBitmapOrStr) (*bitmap.Bitmap, error) {
	size := d.Bits().Size()
	sum := bitmap.New(size, d.Bits().Granularity())
	for _, b := range from {
		node, name := d.Node().Name(), ""
		if b.Local != nil {
			name = *b.Local
		} else {
			node, name = b.External.Node, b.External.Name
		}
		x, err := tx.FindDirtyBitmap(node, name)
		if err != nil {
			return nil, err
		}
		if err := x.Check(graph.BitmapRead); err != nil {
			return nil, err
		}
		if have := x.Bits().Size(); have != size {
			return nil, fmt.Errorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", size, have)
		}
		if len(from) == 1 && x.Bits().Granularity() == d.Bits().Granularity() {
			return x.Bits(), nil
		}
		sum.Merge(x.Bits())
	}
	return sum, nil
}

// maxDigest is the most that is digested of a bitmap, in bytes: it is told within seconds, and few
// disks have such bitmaps.
const maxDigest = 1 << 30

// BitmapSHA256 is the digest of a bitmap: of its words of 64 bits in the order of memory, in
// hexadecimal digits. Errors: no such bitmap, it is too large, the cause of the end of ctx.
func (bs bitmaps) BitmapSHA256(ctx context.Context, node, name string) (string, error) {
	var d *graph.DirtyBitmap
	hold, err := bs.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		if d, err = bs.g.FindDirtyBitmap(node, name); err != nil {
			return nil, err
		}
		return []*graph.Node{d.Node()}, nil
	})
	if err != nil {
		return "", err
	}
	defer hold.Release()
	const step = 1 << 20 // bytes
	b := d.Bits()
	n := max((b.Granules()+63)/64, 1) * 8
	if n > maxDigest {
		return "", fmt.Errorf("Bitmap '%s' is too large for a digest: it has %d granules", name, b.Granules())
	}
	h := sha256.New()
	var buf []byte
	for at := int64(0); at < n; at += step {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		buf = b.AppendBytes(buf[:0], at*8, min(step, n-at))
		h.Write(buf)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
