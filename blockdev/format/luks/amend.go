package luks

import (
	"context"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// change is a change of keys that has begun.
type change struct {
	*driver.Amendment
	*driver.Turns
	d *disk
	o *types.BlockdevAmendOptionsLUKS
}

// amend begins to change keys: nobody else may read or write the header's file until it ends.
func amend(ctx context.Context, a *driver.Amendment, o *types.BlockdevAmendOptionsLUKS) (*driver.Amending, error) {
	d := a.Node.Driver().(*disk)
	c := &change{Amendment: a, d: d, o: o}
	d.changing.Add(1)
	var err error
	claim := func(tx *graph.Tx) error { return tx.Refresh(a.Node) }
	if c.Turns, err = a.Turns(ctx, claim, a.Node, d.meta.Node()); err != nil {
		d.changing.Add(-1)
		return nil, err
	}
	return &driver.Amending{Do: c.do, End: c.end}, nil
}

// end lets others at the file again.
func (c *change) end() {
	c.d.changing.Add(-1)
	c.Turns.End()
}

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
	return k.Make(ctx, &h, luks.Gated(func(f func(st luks.Store) error) error {
		return c.Take(ctx, started, func(r *blk.Req) error { return f(store{r, c.d.meta}) })
	}))
}
