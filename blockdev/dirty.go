package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// The bodies of the block-dirty-bitmap- commands, as steps of a transaction (jobs.Action). They change bitmaps in Prepare, so that later
// steps find them as these leave them, and take that back in Abort, so that no write that happened meanwhile is missing.

// BitmapStep is one of these steps.
type BitmapStep struct {
	node    string // of the bitmap
	quiet   bool   // the node is held quiet
	g       *graph.Graph
	prepare func(s *BitmapStep) error
	undo    func() // what Abort does; nil: nothing was done
	finish  func() // what Commit does
}

// Nodes implements jobs.Action.
func (s *BitmapStep) Nodes() []*graph.Node {
	if n := s.g.Node(s.node); s.quiet && n != nil {
		return []*graph.Node{n}
	}
	return nil
}

// Prepare implements jobs.Action.
func (s *BitmapStep) Prepare(context.Context, *graph.Tx) error { return s.prepare(s) }

// Commit implements jobs.Action.
func (s *BitmapStep) Commit() {
	if s.finish != nil {
		s.finish()
	}
}

// Abort implements jobs.Action.
func (s *BitmapStep) Abort() {
	if s.undo != nil {
		s.undo()
	}
}

// Clean implements jobs.Action.
func (s *BitmapStep) Clean() {}

// BitmapAdd makes the step block-dirty-bitmap-add.
func (m *Manager) BitmapAdd(a *types.BlockDirtyBitmapAdd) *BitmapStep {
	return &BitmapStep{g: m.g, node: a.Node, prepare: func(s *BitmapStep) error {
		if a.Name == "" {
			return errors.New("Bitmap name cannot be empty")
		}
		n, err := m.Lookup(&a.Node, &a.Node)
		if err != nil {
			return err
		}
		spec := graph.DirtyBitmapSpec{Name: a.Name, Disabled: a.Disabled != nil && *a.Disabled}
		if g := a.Granularity; g != nil {
			if *g < graph.MinGranularity || *g&(*g-1) != 0 {
				return errors.New("Granularity must be power of 2 and at least 512")
			}
			spec.Granularity = int64(*g)
		}
		if a.Persistent != nil && *a.Persistent {
			spec.Persistent = true
			if err := canStore(n, &spec); err != nil {
				return err
			}
		}
		d, err := n.NewDirtyBitmap(spec)
		if err == nil {
			s.undo = d.Remove
		}
		return err
	}}
}

// canStore tells why n cannot keep a persistent bitmap, in the reference's words.
func canStore(n *graph.Node, spec *graph.DirtyBitmapSpec) error {
	store, ok := n.Driver().(graph.BitmapStore)
	if !ok {
		return fmt.Errorf("Can't store persistent bitmaps to %s: Operation not supported", n.Name())
	}
	others := 0
	for _, d := range n.DirtyBitmaps() {
		if d.Persistent() {
			others++
		}
	}
	g := spec.Granularity
	if g == 0 {
		g = n.DefaultGranularity()
	}
	if n.DirtyBitmap(spec.Name) != nil {
		return nil // which is told next
	}
	if err := store.CanStoreBitmap(spec.Name, g, others); err != nil {
		return fmt.Errorf("Can't make bitmap '%s' persistent in '%s': %w", spec.Name, n.Name(), err)
	}
	return nil
}

// onBitmap makes a step that does something with a bitmap that can be used that way.
func (m *Manager) onBitmap(a *types.BlockDirtyBitmap, use graph.BitmapUse, do func(s *BitmapStep, d *graph.DirtyBitmap)) *BitmapStep {
	return &BitmapStep{g: m.g, node: a.Node, prepare: func(s *BitmapStep) error {
		d, err := m.g.FindDirtyBitmap(a.Node, a.Name)
		if err == nil {
			err = d.Check(use)
		}
		if err == nil {
			do(s, d)
		}
		return err
	}}
}

// BitmapRemove makes the step block-dirty-bitmap-remove. The bitmap goes on recording until Commit, so that it has missed nothing if it
// stays. One in the image goes from there, too; if that fails it stays there as one that cannot be trusted, until the image is closed.
func (m *Manager) BitmapRemove(a *types.BlockDirtyBitmap) *BitmapStep {
	s := m.onBitmap(a, graph.BitmapRemove, func(s *BitmapStep, d *graph.DirtyBitmap) {
		d.SetBusy(true)
		s.undo = func() { d.SetBusy(false) }
		s.finish = func() {
			d.Remove()
			if store, ok := d.Node().Driver().(graph.BitmapStore); ok && d.Persistent() {
				if err := store.RemoveBitmap(&blk.Req{Ctx: context.Background()}, d.Name()); err != nil {
					m.log.Warn("a bitmap stays in its image for the time being", "node", d.Node().Name(), "bitmap", d.Name(), "error", err)
				}
			}
		}
	})
	s.quiet = true // as the image is written to
	return s
}

// BitmapClear makes the step block-dirty-bitmap-clear.
func (m *Manager) BitmapClear(a *types.BlockDirtyBitmap) *BitmapStep {
	return m.onBitmap(a, graph.BitmapChange, func(s *BitmapStep, d *graph.DirtyBitmap) {
		old := d.Take()
		s.undo = func() { d.Bits().Merge(old) }
	})
}

// BitmapEnable makes the step block-dirty-bitmap-enable or -disable. One that is disabled goes on recording until Commit, so that it has
// missed nothing if it stays enabled.
func (m *Manager) BitmapEnable(a *types.BlockDirtyBitmap, enable bool) *BitmapStep {
	return m.onBitmap(a, graph.BitmapRead, func(s *BitmapStep, d *graph.DirtyBitmap) {
		switch {
		case d.Enabled() == enable:
		case enable:
			d.Enable()
			s.undo = d.Disable
		default:
			s.finish = d.Disable
		}
	})
}

// BitmapMerge makes the step block-dirty-bitmap-merge. The node is quiet, as nothing may be recorded that an undo would take for merged.
func (m *Manager) BitmapMerge(a *types.BlockDirtyBitmapMerge) *BitmapStep {
	return &BitmapStep{g: m.g, node: a.Node, quiet: true, prepare: func(s *BitmapStep) error {
		d, err := m.g.FindDirtyBitmap(a.Node, a.Target)
		if err != nil {
			return err
		}
		sum, err := m.sum(d, a.Bitmaps)
		if err == nil {
			err = d.Check(graph.BitmapChange)
		}
		if err != nil {
			return err
		}
		before := d.Bits().Clone()
		d.Bits().Merge(sum)
		s.undo = func() {
			d.Take()
			d.Bits().Merge(before)
		}
		return nil
	}}
}

// sum merges bitmaps in the granularity of d, which stays as it is.
func (m *Manager) sum(d *graph.DirtyBitmap, from []*types.BlockDirtyBitmapOrStr) (*bitmap.Bitmap, error) {
	size := d.Bits().Size()
	sum := bitmap.New(size, d.Bits().Granularity())
	for _, b := range from {
		node, name := d.Node().Name(), ""
		if b.Local != nil {
			name = *b.Local
		} else {
			node, name = b.External.Node, b.External.Name
		}
		x, err := m.g.FindDirtyBitmap(node, name)
		if err != nil {
			return nil, err
		}
		if err := x.Check(graph.BitmapRead); err != nil {
			return nil, err
		}
		if have := x.Bits().Size(); have != size {
			return nil, fmt.Errorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", size, have)
		}
		sum.Merge(x.Bits())
	}
	return sum, nil
}

// BitmapSHA256 is the digest of a bitmap: of its words of 64 bits in the order of memory, in hexadecimal digits.
func (m *Manager) BitmapSHA256(node, name string) (string, error) {
	d, err := m.g.FindDirtyBitmap(node, name)
	if err != nil {
		return "", err
	}
	const step = 1 << 20 // bytes
	b := d.Bits()
	words := max((b.Granules()+63)/64, 1)
	h := sha256.New()
	var buf []byte
	for at := int64(0); at < words*8; at += step {
		buf = b.AppendBytes(buf[:0], at*8, min(step, words*8-at))
		h.Write(buf)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
