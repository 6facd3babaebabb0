package qcow2

import (
	"context"
	"errors"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// amend begins to change the keys of an encrypted image. Nobody else reads or writes what has them:
// the image is its node's alone, and who changes them holds the node.
func amend(ctx context.Context, a *driver.Amendment, o *types.BlockdevAmendOptionsQcow2) (*driver.Amending, error) {
	d := a.Node.Driver().(*Driver)
	if o != nil && *o != (types.BlockdevAmendOptionsQcow2{Encrypt: o.Encrypt}) {
		return d.amendImage(a, o)
	}
	if o == nil || o.Encrypt == nil {
		return &driver.Amending{Do: func(context.Context, func()) error { return nil }, End: func() {}}, nil
	}
	turns, err := a.Turns(ctx, nil, a.Node)
	if err != nil {
		return nil, err
	}
	return &driver.Amending{
		Do: func(ctx context.Context, started func()) error {
			return d.changeKeys(ctx, a, o.Encrypt, luks.Gated(func(f func(st luks.Store) error) error {
				return turns.Take(ctx, started, func(r *blk.Req) error { return withKeys(d.image, r, f) })
			}))
		},
		End: turns.End,
	}, nil
}

// changeKeys makes the change.
func (d *Driver) changeKeys(
	ctx context.Context, a *driver.Amendment, o *types.QCryptoBlockAmendOptions, st luks.Store,
) error {
	switch {
	case d.seal == nil:
		return errors.New("image is not encrypted, can't amend")
	case o.Format != types.QCryptoBlockFormatLuks:
		return errors.New("Amend can't be used to change the qcow2 encryption format")
	case d.seal.header.Load() == nil:
		return errors.New("Only LUKS encryption options can be amended for qcow2 with blockdev-amend")
	}
	h := *d.seal.header.Load()
	defer func() {
		d.seal.header.Store(&h) // also what was done before something failed
		a.Node.Bump()
	}()
	c := luks.Change{
		Options: o.U.(*types.QCryptoBlockAmendOptionsLUKS), Force: a.Force, Secret: d.seal.secret,
		Password: func(secret string) (*crypto.Key, error) { return driver.Password(a.Objects, secret) },
	}
	return c.Make(ctx, &h, st)
}

// withKeys has mu while f uses the header with the keys.
func withKeys(s *image, r *blk.Req, f func(st luks.Store) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	return f(vettedArea{keyArea{&s.imageFile, r}, s})
}

// vettedArea is a keyArea that is not written to before it was looked at what lies over it.
type vettedArea struct {
	keyArea
	whole *image
}

// WriteAt implements luks.Store.
// +checklocksignore
func (v vettedArea) WriteAt(b []byte, off int64) error {
	if err := v.whole.vet(v.r); err != nil {
		return err
	}
	return v.keyArea.WriteAt(b, off)
}
