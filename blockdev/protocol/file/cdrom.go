package file

import (
	"context"
	"math"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// cdrom is the driver host_cdrom: a drive whose disk may be changed or missing. It does less than a
// disk: there is nothing to discard or to map.
type cdrom struct {
	d    *disk
	disc func(fd int) bool // hasDisc but in tests
}

var (
	_ graph.Writer     = (*cdrom)(nil)
	_ graph.Flusher    = (*cdrom)(nil)
	_ graph.Resizer    = (*cdrom)(nil)
	_ graph.PermTaker  = (*cdrom)(nil)
	_ graph.Sizer      = (*cdrom)(nil)
	_ graph.Identified = (*cdrom)(nil)
	_ graph.Lagging    = (*cdrom)(nil)
)

func openCdrom(o *driver.Opening, opts *types.BlockdevOptionsFile) (graph.Driver, error) {
	d, err := open(o, opts, true)
	if err != nil {
		return nil, err
	}
	return &cdrom{d.(*disk), hasDisc}, nil
}

// Of linux/cdrom.h, which golang.org/x/sys/unix has not.
const (
	cdromDriveStatus = 0x5326
	cdslCurrent      = math.MaxInt32
	cdsDiscOK        = 4
)

// hasDisc asks a drive; what is no drive has none.
func hasDisc(fd int) bool {
	status, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cdromDriveStatus, cdslCurrent)
	return e == 0 && status == cdsDiscOK
}

// medium is nil if there is a disk in the drive; it asks the drive, which may take its time.
func (c *cdrom) medium(r *blk.Req) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	h, err := c.d.begin(r)
	if err != nil {
		return err
	}
	defer c.d.end(h)
	if !c.disc(h.fd) {
		return blk.ErrNoMedium
	}
	return nil
}

// Caps implements graph.Driver.
func (c *cdrom) Caps() graph.Caps { return graph.Caps{Limits: c.d.limits} }

// Size implements graph.Driver: that of the disk of the time, as the kernel knows it.
func (c *cdrom) Size() int64 {
	if h := c.d.hold(); h != nil {
		if n, err := seekEnd(h.fd); err == nil && n != c.d.eof.Load() {
			c.d.setEnd(n)
		}
		h.drop()
	}
	return c.d.Size()
}

// ReadAt implements graph.Driver.
func (c *cdrom) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := c.medium(r); err != nil {
		return err
	}
	return c.d.ReadAt(r, v, off, f)
}

// WriteAt implements graph.Writer.
func (c *cdrom) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if err := c.medium(r); err != nil {
		return err
	}
	return c.d.WriteAt(r, v, off, f)
}

// Flush implements graph.Flusher. Without a disk there is nothing to flush.
func (c *cdrom) Flush(r *blk.Req) error {
	switch err := c.medium(r); err {
	case blk.ErrNoMedium:
		return nil
	case nil:
		return c.d.Flush(r)
	default:
		return err
	}
}

// Resize implements graph.Resizer.
func (c *cdrom) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	if c.medium(&blk.Req{Ctx: ctx}) != nil {
		return blk.Text("No medium inserted", blk.ErrNoMedium)
	}
	return c.d.Resize(ctx, size, m)
}

// The rest is as with other devices.

// PermPrepare implements graph.PermTaker.
func (c *cdrom) PermPrepare(ctx context.Context, p perm.Claim) error { return c.d.PermPrepare(ctx, p) }

// PermCommit implements graph.PermTaker.
func (c *cdrom) PermCommit() { c.d.PermCommit() }

// PermAbort implements graph.PermTaker.
func (c *cdrom) PermAbort() { c.d.PermAbort() }

// ActualSize implements graph.Sizer.
func (c *cdrom) ActualSize() (int64, error) { return c.d.ActualSize() }

// FileID implements graph.Identified.
func (c *cdrom) FileID() graph.FileID { return c.d.FileID() }

// Lag implements graph.Lagging.
func (c *cdrom) Lag() (int64, bool) { return c.d.Lag() }

// Close implements graph.Driver.
func (c *cdrom) Close() error { return c.d.Close() }
