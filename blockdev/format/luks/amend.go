package luks

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
	if a.Node.Inactive() || d.meta.Node().Inactive() {
		return nil, &perm.InactiveError{Perms: perm.Write}
	}
	c := &change{Amendment: a, d: d, o: o}
	d.changing.Add(1)
	err := a.Graph.Do(ctx, func(tx *graph.Tx) (err error) {
		spec := graph.RootSpec{EdgeName: "root", Kind: graph.KindBackend, Claim: perm.Claim{Share: perm.All},
			StayAtNode: true, Job: true}
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
	k := luks.Change{
		Options: (*types.QCryptoBlockAmendOptionsLUKS)(c.o), Force: c.Force, Secret: c.d.secret,
		Password: func(secret string) (*crypto.Key, error) { return driver.Password(c.Objects, secret) },
	}
	return k.Make(ctx, &h, gated{ctx, c.root, c.d.meta, started})
}
