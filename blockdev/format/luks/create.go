package luks

import (
	"context"
	"errors"
	"syscall"

	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

var errNowhere = errors.New("Either the parameter 'header' or 'file' must be specified")

// inFiles opens what an image is made in. header is the same as data if it is at its beginning;
// data is nil if the header alone is to be made.
func inFiles(
	ctx context.Context, c *driver.Creation, o *types.BlockdevCreateOptionsLUKS, use func(header, data *graph.Root) error,
) error {
	switch {
	case o.Header == nil && o.File == nil:
		c.Started()
		return errNowhere
	case o.Header == nil:
		return c.InFile(ctx, o.File, func(data *graph.Root) error { return use(data, data) })
	case o.File == nil:
		return c.InFile(ctx, o.Header, func(header *graph.Root) error { return use(header, nil) })
	}
	return c.InFile(ctx, o.File, func(data *graph.Root) error {
		return c.InFile(ctx, o.Header, func(header *graph.Root) error { return use(header, data) })
	})
}

// create makes an image in the nodes below two roots. Its header is written last: until then there
// is none.
func create(
	ctx context.Context, c *driver.Creation, header, data *graph.Root, o *types.BlockdevCreateOptionsLUKS,
) error {
	c.Started() // QEMU answers before it looks at the options
	word, err := password(c.Objects, o.KeySecret)
	if err != nil {
		return err
	}
	defer word.Close()
	h, master, millis, err := luks.NewAs(ctx, &types.QCryptoBlockCreateOptionsLUKS{
		CipherAlg: o.CipherAlg, CipherMode: o.CipherMode, IvgenAlg: o.IvgenAlg, IvgenHashAlg: o.IvgenHashAlg,
		HashAlg: o.HashAlg, IterTime: o.IterTime,
	})
	if err != nil {
		return err
	}
	defer master.Close()
	if header != data {
		if err := header.Resize(ctx, h.PayloadOffset(), true, blk.PreallocOff); err != nil {
			return err
		}
		h.Payload = 0
	}
	if data != nil {
		if err := resize(ctx, data, h.PayloadOffset(), o); err != nil {
			return err
		}
	}
	r, err := header.Begin(ctx)
	if err != nil {
		return err
	}
	defer header.End(r)
	return h.SetKey(ctx, store{r, header.Edge()}, 0, master, word.Bytes(), millis)
}

var errTooLarge = blk.Text("The requested file size is too large", syscall.EFBIG)

// resize gives the file the length of the image.
func resize(ctx context.Context, root *graph.Root, payload int64, o *types.BlockdevCreateOptionsLUKS) error {
	const most = 1<<63 - 1
	if o.Size > uint64(most-payload) {
		return errTooLarge
	}
	m := blk.PreallocOff
	if o.Preallocation != nil && *o.Preallocation != types.PreallocModeMetadata { // there are none to allocate
		m = blk.Prealloc(*o.Preallocation)
	}
	err := root.Resize(ctx, int64(o.Size)+payload, true, m)
	if errors.Is(err, syscall.EFBIG) && int64(o.Size)+payload <= blk.MaxSize {
		return errTooLarge
	}
	return err
}
