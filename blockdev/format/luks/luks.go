package luks

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"syscall"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// disk is the driver of a node.
type disk struct {
	file    *graph.Edge
	meta    *graph.Edge // where the header is: file, or a child of its own
	payload int64       // where the disk begins in the file
	cipher  *crypto.Cipher
	header  atomic.Pointer[luks.Header]
	secret  string // that the disk was opened with
	// changing counts the changes of keys that have begun.
	changing atomic.Int32
}

// errNoKey: a disk without a password is of no use.
var errNoKey = errors.New("Parameter 'key-secret' is required for cipher")

// password is what the secret of that name says.
func password(objects driver.Objects, secret *string) (*crypto.Key, error) {
	if secret == nil {
		return nil, errNoKey
	}
	return driver.Password(objects, *secret)
}

func open(x *driver.Opening, u *types.BlockdevOptionsLUKS) (graph.Driver, error) {
	word, err := password(x.Objects, u.KeySecret)
	if err != nil {
		return nil, err
	}
	defer word.Close()
	d := &disk{file: x.Node.File(), meta: x.Node.Child(headerName), secret: *u.KeySecret}
	if d.file == nil {
		return nil, errors.New("luks has no file")
	}
	if d.meta == nil {
		d.meta = d.file
	}
	st := store{x.Req, d.meta}
	h, err := luks.Read(st, d.detached())
	if err != nil {
		return nil, err
	}
	d.header.Store(h)
	d.payload = h.PayloadOffset()
	master, err := h.Unlock(x.Ctx, st, word.Bytes())
	if err != nil {
		return nil, err
	}
	defer master.Close()
	if d.payload > d.file.Size() {
		return nil, blk.Errnof(syscall.EIO, "Could not refresh total sector count")
	}
	d.cipher, err = crypto.New(h.Spec, master.Bytes())
	if err != nil {
		return nil, err
	}
	return d, nil
}

// detached tells whether the header is not in the file.
func (d *disk) detached() bool { return d.meta != d.file }

// store is the header within its file.
type store struct {
	r *blk.Req
	e *graph.Edge
}

// ReadAt implements luks.Store.
func (s store) ReadAt(b []byte, off int64) error { return s.e.ReadAt(s.r, blk.Buf(b), off, 0) }

// WriteAt implements luks.Store.
func (s store) WriteAt(b []byte, off int64) error { return s.e.WriteAt(s.r, blk.Buf(b), off, 0) }

// Flush implements luks.Store.
func (s store) Flush() error { return s.e.Flush(s.r) }

// Caps implements graph.Driver. Flags pass to the file.
func (d *disk) Caps() graph.Caps {
	return graph.Caps{
		WriteFlags: blk.FUA | blk.WriteUnchanged,
		Limits:     blk.Limits{RequestAlign: crypto.SectorSize, OptTransfer: d.file.Caps().Limits.OptTransfer},
	}
}

// Size implements graph.Driver: what the file has behind the header, rounded up to sectors.
func (d *disk) Size() int64 { return blk.AlignUp(max(d.file.Size()-d.payload, 0), blk.SectorSize) }

// Close implements graph.Driver.
func (d *disk) Close() error {
	d.cipher.Close()
	return nil
}

// EdgeClaim implements graph.Permer: nothing but requests changes the file, so it is claimed as
// parents claim the node, and others may write to it if the parents can live with that. The header
// is read, so whatever the parents do, what is there has to be the image. While keys change nobody
// else has anything to do with it: two who change them at once would undo what the other did.
func (d *disk) EdgeClaim(child string, _ perm.Role, up perm.Claim, _ bool) perm.Claim {
	c := perm.Claim{Need: up.Need&perm.All | perm.ConsistentRead, Share: up.Share & perm.All}
	if child == headerName {
		c = perm.Claim{Need: perm.ConsistentRead, Share: perm.All}
	}
	if child == d.meta.ChildName() && d.changing.Load() > 0 {
		c.Need |= perm.Write
		c.Share &^= perm.Write | perm.ConsistentRead
	}
	return c
}

// Resize implements graph.Resizer.
func (d *disk) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	if size > math.MaxInt64-d.payload {
		return blk.Text("Volume size is too large", syscall.EFBIG)
	}
	return d.file.Resize(ctx, size+d.payload, true, m)
}

// ImageInfo implements graph.Informer.
func (d *disk) ImageInfo(info *types.ImageInfo) {
	d.file.ShowImage(info)
	encrypted := true
	info.Encrypted = &encrypted
	h := d.header.Load()
	data := h.Info()
	if detached := d.detached(); detached {
		data.DetachedHeader = &detached
	}
	info.FormatSpecific = &types.ImageInfoSpecific{
		Type: types.ImageInfoSpecificKindLuks, U: &types.ImageInfoSpecificLUKSWrapper{Data: data},
	}
}
