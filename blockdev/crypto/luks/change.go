package luks

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Change is a change of keys that somebody has asked for.
type Change struct {
	Options *types.QCryptoBlockAmendOptionsLUKS
	// Force: also do what may lose data.
	Force bool
	// Secret is the one that the disk was opened with.
	Secret string
	// Password is a copy of the text of a secret, which the change closes.
	Password func(secret string) (*crypto.Key, error)
}

// Make makes the change. h is as the header is then, also after an error.
func (c *Change) Make(ctx context.Context, h *Header, st Store) error {
	if c.Options.State == types.QCryptoBlockLUKSKeyslotStateActive {
		return c.add(ctx, h, st)
	}
	return c.erase(ctx, h, st)
}

// slot is the place that the options name.
func (c *Change) slot() (int, error) {
	if n := *c.Options.Keyslot; n < 0 || n >= Slots {
		return 0, fmt.Errorf("Invalid keyslot %d specified, must be between 0 and %d", uint32(n), Slots-1)
	}
	return int(*c.Options.Keyslot), nil
}

// add makes a slot active.
func (c *Change) add(ctx context.Context, h *Header, st Store) error {
	switch {
	case c.Options.NewSecret == nil:
		return errors.New("'new-secret' is required to activate a keyslot")
	case c.Options.OldSecret != nil:
		return errors.New("'old-secret' must not be given when activating keyslots")
	}
	slot := 0
	if c.Options.Keyslot != nil {
		var err error
		if slot, err = c.slot(); err != nil {
			return err
		}
		if h.Slots[slot].Active && !c.Force {
			return fmt.Errorf("Refusing to overwrite active keyslot %d - please erase it first", slot)
		}
	} else {
		for slot < Slots && h.Slots[slot].Active {
			slot++
		}
		if slot == Slots {
			return errors.New("Can't add a keyslot - all keyslots are in use")
		}
	}
	old, err := c.Password(pick(c.Options.Secret, c.Secret))
	if err != nil {
		return err
	}
	defer old.Close()
	master, err := h.Unlock(ctx, st, old.Bytes())
	if err != nil {
		return err
	}
	defer master.Close()
	word, err := c.Password(*c.Options.NewSecret)
	if err != nil {
		return err
	}
	defer word.Close()
	if err := h.SetKey(ctx, st, slot, master, word.Bytes(), pick(c.Options.IterTime, DefaultMillis)); err != nil {
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
func (c *Change) erase(ctx context.Context, h *Header, st Store) error {
	switch {
	case c.Options.NewSecret != nil:
		return errors.New("'new-secret' must not be given when erasing keyslots")
	case c.Options.IterTime != nil:
		return errors.New("'iter-time' must not be given when erasing keyslots")
	case c.Options.Secret != nil:
		return errors.New("'secret' must not be given when erasing keyslots")
	case c.Options.Keyslot == nil && c.Options.OldSecret == nil:
		return errors.New("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given")
	}
	var slots []int
	var err error
	if c.Options.Keyslot != nil {
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
func active(h *Header) (n int) {
	for i := range h.Slots {
		if h.Slots[i].Active {
			n++
		}
	}
	return n
}

// named is the one slot that the options name, if it may be erased.
func (c *Change) named(ctx context.Context, h *Header, st Store) ([]int, error) {
	slot, err := c.slot()
	if err != nil {
		return nil, err
	}
	if c.Options.OldSecret != nil {
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
func (c *Change) matching(ctx context.Context, h *Header, st Store) (slots []int, err error) {
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
func (c *Change) opens(ctx context.Context, h *Header, st Store, slot int) (bool, error) {
	word, err := c.Password(*c.Options.OldSecret)
	if err != nil {
		return false, err
	}
	defer word.Close()
	key, err := h.UnlockSlot(ctx, st, slot, word.Bytes())
	key.Close()
	return key != nil, err
}
