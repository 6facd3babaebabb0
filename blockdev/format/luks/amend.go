package luks

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// change is a change of keys that has begun.
type change struct {
	*driver.Amendment
	d    *disk
	o    *types.BlockdevAmendOptionsLUKS
	root *graph.Root
}

// amend begins to change keys: nobody else may read or write the header's file until it ends.
func amend(ctx context.Context, a *driver.Amendment, o *types.BlockdevAmendOptionsLUKS) (*driver.Amending, error) {
	d := a.Node.Driver().(*disk)
	if a.Node.ReadOnly() || d.meta.Node().ReadOnly() {
		return nil, errors.New("Block node is read-only")
	}
	c := &change{Amendment: a, d: d, o: o}
	d.changing.Add(1)
	err := a.Graph.Do(ctx, func(tx *graph.Tx) (err error) {
		spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Claim{Share: perm.All}, StayAtNode: true}
		if c.root, err = tx.AttachRoot(spec, a.Node); err != nil {
			return err
		}
		return tx.Refresh(a.Node)
	})
	if err != nil {
		d.changing.Add(-1)
		return nil, err
	}
	return &driver.Amending{Do: c.do, End: c.end}, nil
}

// end lets others at the file again.
func (c *change) end() {
	c.d.changing.Add(-1)
	err := c.Graph.Do(context.Background(), func(tx *graph.Tx) error {
		if err := tx.Refresh(c.Node); err != nil {
			return err
		}
		return tx.DetachRoot(c.root)
	})
	if err != nil {
		slog.Error("the claims of a change of keys could not be given back", "node", c.Node.Name(), "err", err)
	}
}

// gated is the header, each access a unit of work of its own: between them, while keys are made of
// passwords, the node can be drained.
type gated struct {
	ctx     context.Context
	root    *graph.Root
	e       *graph.Edge
	started func()
}

func (g gated) do(f func(s store) error) error {
	g.started()
	r, err := g.root.Begin(g.ctx)
	if err != nil {
		return err
	}
	defer g.root.End(r)
	return f(store{r, g.e})
}

// ReadAt implements luks.Store.
func (g gated) ReadAt(b []byte, off int64) error {
	return g.do(func(s store) error { return s.ReadAt(b, off) })
}

// WriteAt implements luks.Store.
func (g gated) WriteAt(b []byte, off int64) error {
	return g.do(func(s store) error { return s.WriteAt(b, off) })
}

// Flush implements luks.Store.
func (g gated) Flush() error { return g.do(store.Flush) }

// do makes the change; the node is held.
func (c *change) do(ctx context.Context, started func()) error {
	h := *c.d.header.Load()
	defer func() {
		c.d.header.Store(&h) // also what was done before something failed
		c.Node.Bump()
	}()
	st := gated{ctx, c.root, c.d.meta, started}
	if c.o.State == types.QCryptoBlockLUKSKeyslotStateActive {
		return c.add(ctx, &h, st)
	}
	return c.erase(ctx, &h, st)
}

// slot is the place that the options name.
func (c *change) slot() (int, error) {
	if n := *c.o.Keyslot; n < 0 || n >= luks.Slots {
		return 0, fmt.Errorf("Invalid keyslot %d specified, must be between 0 and %d", uint32(n), luks.Slots-1)
	}
	return int(*c.o.Keyslot), nil
}

// add makes a slot active.
func (c *change) add(ctx context.Context, h *luks.Header, st luks.Store) error {
	switch {
	case c.o.NewSecret == nil:
		return errors.New("'new-secret' is required to activate a keyslot")
	case c.o.OldSecret != nil:
		return errors.New("'old-secret' must not be given when activating keyslots")
	}
	slot := 0
	if c.o.Keyslot != nil {
		var err error
		if slot, err = c.slot(); err != nil {
			return err
		}
		if h.Slots[slot].Active && !c.Force {
			return fmt.Errorf("Refusing to overwrite active keyslot %d - please erase it first", slot)
		}
	} else {
		for slot < luks.Slots && h.Slots[slot].Active {
			slot++
		}
		if slot == luks.Slots {
			return errors.New("Can't add a keyslot - all keyslots are in use")
		}
	}
	old, err := driver.Password(c.Objects, pick(c.o.Secret, c.d.secret))
	if err != nil {
		return err
	}
	defer old.Close()
	master, err := h.Unlock(ctx, st, old.Bytes())
	if err != nil {
		return err
	}
	defer master.Close()
	word, err := driver.Password(c.Objects, *c.o.NewSecret)
	if err != nil {
		return err
	}
	defer word.Close()
	if err := h.SetKey(ctx, st, slot, master, word.Bytes(), pick(c.o.IterTime, luks.DefaultMillis)); err != nil {
		return told(err, fmt.Sprintf("Failed to write to keyslot %d", slot))
	}
	return nil
}

// told keeps texts that say what failed, and gives bare errors of I/O one.
func told(err error, what string) error {
	if err.Error() == error(blk.Errno(err)).Error() {
		return blk.Errnof(err, "%s", what)
	}
	return err
}

// erase makes slots inactive.
func (c *change) erase(ctx context.Context, h *luks.Header, st luks.Store) error {
	switch {
	case c.o.NewSecret != nil:
		return errors.New("'new-secret' must not be given when erasing keyslots")
	case c.o.IterTime != nil:
		return errors.New("'iter-time' must not be given when erasing keyslots")
	case c.o.Keyslot == nil && c.o.OldSecret == nil:
		return errors.New("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given")
	}
	var slots []int
	var err error
	if c.o.Keyslot != nil {
		slots, err = c.named(ctx, h, st)
	} else {
		slots, err = c.matching(ctx, h, st)
	}
	if err != nil {
		return err
	}
	for _, slot := range slots {
		if err := h.Erase(st, slot); err != nil {
			return told(err, fmt.Sprintf("Failed to erase keyslot %d", slot))
		}
	}
	return nil
}

// active counts the slots that open the disk.
func active(h *luks.Header) (n int) {
	for i := range h.Slots {
		if h.Slots[i].Active {
			n++
		}
	}
	return n
}

// named is the one slot that the options name, if it may be erased.
func (c *change) named(ctx context.Context, h *luks.Header, st luks.Store) ([]int, error) {
	slot, err := c.slot()
	if err != nil {
		return nil, err
	}
	if c.o.OldSecret != nil {
		switch ok, err := c.opens(ctx, h, st, slot); {
		case err != nil:
			return nil, err
		case !ok:
			return nil, fmt.Errorf("Given keyslot %d doesn't contain the given old password for erase operation", slot)
		}
	}
	switch {
	case c.Force:
	case !h.Slots[slot].Active:
		return nil, fmt.Errorf("Given keyslot %d is already erased (inactive) ", slot)
	case active(h) == 1:
		return nil, fmt.Errorf("Attempt to erase the only active keyslot %d which will erase all the data in the image irreversibly - refusing operation", slot)
	}
	return []int{slot}, nil
}

// matching are the slots that the old password opens, if they may be erased.
func (c *change) matching(ctx context.Context, h *luks.Header, st luks.Store) (slots []int, err error) {
	for slot := range h.Slots {
		ok, err := c.opens(ctx, h, st, slot)
		if err != nil {
			return nil, err
		}
		if ok {
			slots = append(slots, slot)
		}
	}
	switch {
	case len(slots) == 0:
		return nil, errors.New("No keyslots match given (old) password for erase operation")
	case len(slots) == active(h) && !c.Force:
		return nil, errors.New("All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation")
	}
	return slots, nil
}

// opens tells whether a slot opens with the old password.
func (c *change) opens(ctx context.Context, h *luks.Header, st luks.Store, slot int) (bool, error) {
	word, err := driver.Password(c.Objects, *c.o.OldSecret)
	if err != nil {
		return false, err
	}
	defer word.Close()
	key, err := h.UnlockSlot(ctx, st, slot, word.Bytes())
	key.Close()
	return key != nil, err
}
