package qcow2

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
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
	if a.Node.ReadOnly() {
		return nil, errors.New("Block node is read-only")
	}
	if a.Node.Inactive() {
		return nil, &perm.InactiveError{Perms: perm.Write}
	}
	var root *graph.Root
	err := a.Graph.Do(ctx, func(tx *graph.Tx) (err error) {
		spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Claim{Share: perm.All},
			StayAtNode: true, Job: true}
		root, err = tx.AttachRoot(spec, a.Node)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &driver.Amending{
		Do: func(ctx context.Context, started func()) error {
			return d.changeKeys(ctx, a, o.Encrypt, gatedArea{ctx, root, d.image, started})
		},
		End: func() {
			err := a.Graph.Do(context.Background(), func(tx *graph.Tx) error { return tx.DetachRoot(root) })
			if err != nil {
				slog.Error("the root of a change of keys could not be taken away", "node", a.Node.Name(), "err", err)
			}
		},
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

// gatedArea is the header with the keys, each access a unit of work of its own: between them, while
// keys are made of passwords, the node can be drained.
type gatedArea struct {
	ctx     context.Context
	root    *graph.Root
	s       *image
	started func()
}

// do has mu while f runs, which checklocks cannot know.
func (g gatedArea) do(f func(k keyArea) error) error {
	g.started()
	r, err := g.root.Begin(g.ctx)
	if err != nil {
		return err
	}
	defer g.root.End(r)
	g.s.mu.Lock()
	defer g.s.mu.Unlock()
	if err := g.s.usable(); err != nil {
		return err
	}
	return f(keyArea{&g.s.imageFile, r})
}

// ReadAt implements luks.Store.
// +checklocksignore
func (g gatedArea) ReadAt(b []byte, off int64) error {
	return g.do(func(k keyArea) error { return k.ReadAt(b, off) })
}

// WriteAt implements luks.Store.
func (g gatedArea) WriteAt(b []byte, off int64) error {
	return g.do(func(k keyArea) error { return vetted(k, g.s, b, off) })
}

// vetted writes to the header once it was looked at what that lies over.
// +checklocksignore
func vetted(k keyArea, s *image, b []byte, off int64) error {
	if err := s.vet(k.r); err != nil {
		return err
	}
	return k.WriteAt(b, off)
}

// Flush implements luks.Store.
func (g gatedArea) Flush() error { return g.do(keyArea.Flush) }
