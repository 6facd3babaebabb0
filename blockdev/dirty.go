package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/schema/types"
)

// The bodies of the block-dirty-bitmap- commands, as steps of a transaction (jobs.Action). They change bitmaps in Prepare, so that later
// steps find them as these leave them, and take that back in Abort, so that no write that happened meanwhile is missing.

// bitmapStep is what the steps have in common.
type bitmapStep struct {
	m      *Manager
	bitmap *graph.DirtyBitmap
	undo   func() // nil: nothing was done
	finish func()
}

// Nodes implements jobs.Action.
func (s *bitmapStep) Nodes() []*graph.Node { return nil }

// Commit implements jobs.Action.
func (s *bitmapStep) Commit() {
	if s.finish != nil {
		s.finish()
	}
}

// Abort implements jobs.Action.
func (s *bitmapStep) Abort() {
	if s.undo != nil {
		s.undo()
	}
}

// Clean implements jobs.Action.
func (s *bitmapStep) Clean() {}

// find finds a bitmap as the commands name it.
func (s *bitmapStep) find(node, name string) (err error) {
	s.bitmap, err = s.m.FindBitmap(node, name)
	return err
}

// FindBitmap finds a bitmap by the names of its node and its own.
func (m *Manager) FindBitmap(node, name string) (*graph.DirtyBitmap, error) {
	n := m.g.Node(node)
	if n == nil {
		return nil, fmt.Errorf("Node '%s' not found", node)
	}
	return findBitmap(n, name)
}

func findBitmap(n *graph.Node, name string) (*graph.DirtyBitmap, error) {
	if d := n.DirtyBitmap(name); d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("Dirty bitmap '%s' not found", name)
}

// BitmapAdd is block-dirty-bitmap-add.
type BitmapAdd struct {
	bitmapStep
	args *types.BlockDirtyBitmapAdd
}

// BitmapAdd makes the step.
func (m *Manager) BitmapAdd(a *types.BlockDirtyBitmapAdd) *BitmapAdd {
	return &BitmapAdd{bitmapStep{m: m}, a}
}

// Prepare implements jobs.Action.
func (s *BitmapAdd) Prepare(context.Context, *graph.Tx) error {
	a := s.args
	if a.Name == "" {
		return errors.New("Bitmap name cannot be empty")
	}
	n, err := s.m.Lookup(&a.Node, &a.Node)
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
	if s.bitmap, err = n.NewDirtyBitmap(spec); err == nil {
		s.undo = s.bitmap.Remove
	}
	return err
}

// BitmapRemove is block-dirty-bitmap-remove.
type BitmapRemove struct {
	bitmapStep
	args *types.BlockDirtyBitmap
}

// BitmapRemove makes the step.
func (m *Manager) BitmapRemove(a *types.BlockDirtyBitmap) *BitmapRemove {
	return &BitmapRemove{bitmapStep{m: m}, a}
}

// Prepare implements jobs.Action. The bitmap goes on recording until Commit, so that it has missed nothing if it stays.
func (s *BitmapRemove) Prepare(context.Context, *graph.Tx) error {
	if err := s.find(s.args.Node, s.args.Name); err != nil {
		return err
	}
	if err := s.bitmap.Check(graph.BitmapRemove); err != nil {
		return err
	}
	s.bitmap.SetBusy(true)
	s.undo = func() { s.bitmap.SetBusy(false) }
	s.finish = s.bitmap.Remove
	return nil
}

// BitmapClear is block-dirty-bitmap-clear.
type BitmapClear struct {
	bitmapStep
	args *types.BlockDirtyBitmap
}

// BitmapClear makes the step.
func (m *Manager) BitmapClear(a *types.BlockDirtyBitmap) *BitmapClear {
	return &BitmapClear{bitmapStep{m: m}, a}
}

// Prepare implements jobs.Action.
func (s *BitmapClear) Prepare(context.Context, *graph.Tx) error {
	if err := s.find(s.args.Node, s.args.Name); err != nil {
		return err
	}
	if err := s.bitmap.Check(graph.BitmapChange); err != nil {
		return err
	}
	old := s.bitmap.Take()
	s.undo = func() { s.bitmap.Bits().Merge(old) }
	return nil
}

// BitmapEnable is block-dirty-bitmap-enable and -disable.
type BitmapEnable struct {
	bitmapStep
	args   *types.BlockDirtyBitmap
	enable bool
}

// BitmapEnable makes the step.
func (m *Manager) BitmapEnable(a *types.BlockDirtyBitmap, enable bool) *BitmapEnable {
	return &BitmapEnable{bitmapStep{m: m}, a, enable}
}

// Prepare implements jobs.Action.
func (s *BitmapEnable) Prepare(context.Context, *graph.Tx) error {
	if err := s.find(s.args.Node, s.args.Name); err != nil {
		return err
	}
	if err := s.bitmap.Check(graph.BitmapRead); err != nil {
		return err
	}
	was := s.bitmap.Enabled()
	if was == s.enable {
		return nil
	}
	if !s.enable {
		// It goes on recording until Commit, so that it has missed nothing if it stays enabled.
		s.finish = s.bitmap.Disable
		return nil
	}
	s.bitmap.Enable()
	s.undo = s.bitmap.Disable
	return nil
}

// BitmapMerge is block-dirty-bitmap-merge.
type BitmapMerge struct {
	bitmapStep
	args *types.BlockDirtyBitmapMerge
}

// BitmapMerge makes the step.
func (m *Manager) BitmapMerge(a *types.BlockDirtyBitmapMerge) *BitmapMerge {
	return &BitmapMerge{bitmapStep{m: m}, a}
}

// Nodes implements jobs.Action: nothing may be recorded that an undo would take for merged.
func (s *BitmapMerge) Nodes() []*graph.Node {
	if n := s.m.g.Node(s.args.Node); n != nil {
		return []*graph.Node{n}
	}
	return nil
}

// Prepare implements jobs.Action.
func (s *BitmapMerge) Prepare(context.Context, *graph.Tx) error {
	a := s.args
	if err := s.find(a.Node, a.Target); err != nil {
		return err
	}
	to := s.bitmap.Bits()
	sum := bitmap.New(to.Size(), to.Granularity())
	for _, b := range a.Bitmaps {
		var from *graph.DirtyBitmap
		var err error
		if b.Local != nil {
			from, err = findBitmap(s.bitmap.Node(), *b.Local)
		} else {
			from, err = s.m.FindBitmap(b.External.Node, b.External.Name)
		}
		if err != nil {
			return err
		}
		if err := from.Check(graph.BitmapRead); err != nil {
			return err
		}
		if have := from.Bits().Size(); have != to.Size() {
			return fmt.Errorf("Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged", to.Size(), have)
		}
		sum.Merge(from.Bits())
	}
	if err := s.bitmap.Check(graph.BitmapChange); err != nil {
		return err
	}
	before := to.Clone()
	to.Merge(sum)
	s.undo = func() {
		s.bitmap.Take()
		to.Merge(before)
	}
	return nil
}

// BitmapSHA256 is the digest of a bitmap: of its words of 64 bits in the order of memory, in hexadecimal digits.
func (m *Manager) BitmapSHA256(node, name string) (string, error) {
	d, err := m.FindBitmap(node, name)
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
