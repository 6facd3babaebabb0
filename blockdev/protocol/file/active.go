package file

import (
	"context"

	"qblockd/graph/blk"
)

// Activate implements graph.Activator: others may have changed the length of the file, and another
// host may have written to it.
func (d *disk) Activate(r *blk.Req) error {
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	ctx := r.Ctx
	if ctx == nil {
		ctx = context.Background()
	}
	var end int64
	s := d.settings
	s.direct = d.direct
	late, err := await(ctx, "", func() (err error) {
		if end, err = seekEnd(h.fd); err != nil {
			return blk.Errnof(err, "Could not refresh total sector count")
		}
		return s.takeOver(h.fd)
	}, func(error) { h.drop() })
	if late {
		return err
	}
	h.drop()
	if err != nil {
		return err
	}
	d.extent.Store(nil)
	d.setEnd(end)
	return nil
}
