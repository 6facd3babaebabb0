package luks

import (
	"errors"

	"qblockd/blockdev/crypto/luks"
	"qblockd/graph/blk"
)

// Activate implements graph.Activator: others may have changed the passwords, but not the key.
func (d *disk) Activate(r *blk.Req) error {
	h, err := luks.Read(store{r, d.meta}, d.detached())
	if err != nil {
		return err
	}
	was := d.header.Load()
	if h.Spec != was.Spec || h.Digest != was.Digest || h.Salt != was.Salt || h.Payload != was.Payload {
		return errors.New("Another disk has taken its place; it has to be closed and opened again")
	}
	d.header.Store(h)
	return nil
}
