package graph

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"qblockd/graph/blk"
)

// Texts of Resize.
var (
	errNegativeSize = blk.Text("Image size cannot be negative", errors.Join(blk.ErrOutOfRange, syscall.EINVAL))
	errImageRO      = blk.Text("Image is read-only", errors.Join(blk.ErrReadOnly, syscall.EACCES))
	errNoResize     = blk.Text("Image format driver does not support resize",
		errors.Join(blk.ErrNotSupported, syscall.ENOTSUP))
)

// Resize gives the node below the size size. exact false: it may be longer. What is added reads as
// zeroes, also where a longer backing node would show through. Needs the resize permission. It
// waits for writes in the area that comes or goes and blocks as long as the driver does. Errors end
// in a QMP reply as they are; after one the size is what it was, as far as the driver could undo.
func (e *Edge) Resize(ctx context.Context, size int64, exact bool, m blk.Prealloc) error {
	s := &e.node.Load().io
	switch {
	case s.drv.Driver == nil:
		return blk.ErrClosed
	case size < 0:
		return errNegativeSize
	case size > blk.MaxSize:
		return blk.Text(fmt.Sprintf("offset(%d) exceeds maximum(%d)", size, blk.MaxSize),
			errors.Join(blk.ErrOutOfRange, syscall.EFBIG))
	case s.n.readOnly.Load():
		return errImageRO
	case s.n.inactive.Load():
		return errInactive
	}
	if m == "" {
		m = blk.PreallocOff
	}
	r := &blk.Req{Ctx: ctx}
	k, old, err := s.beginResize(r, size)
	if err != nil {
		return err
	}
	err = s.driverResize(ctx, r, old, size, exact, m)
	s.statusData.drop()
	s.flush.written.Add(1)
	changed := s.drv.Size() != old
	s.track.end(k)
	if changed || err == nil {
		s.n.Resized()
	}
	return err
}

// beginResize registers everything from the smaller of the two sizes on.
func (s *IO) beginResize(r *blk.Req, size int64) (*tracked, int64, error) {
	for {
		old := s.drv.Size()
		lo := min(old, size)
		k, err := s.track.begin(r, lo, blk.MaxSize-lo, true)
		if err != nil {
			return nil, 0, err
		}
		if now := s.drv.Size(); min(now, size) >= lo {
			return k, now, nil
		}
		s.track.end(k)
	}
}

func (s *IO) driverResize(ctx context.Context, r *blk.Req, old, size int64, exact bool, m blk.Prealloc) error {
	if s.drv.resizer == nil {
		if c := s.n.FilteredChild(); s.n.Kind() == Filter && c != nil {
			return c.Resize(ctx, size, exact, m)
		}
		return errNoResize
	}
	if err := s.drv.Resize(ctx, size, m); err != nil {
		if err == blk.ErrNotSupported {
			return errNoResize
		}
		return err
	}
	b := s.n.Backing()
	if b == nil || size <= old {
		return nil
	}
	hi := min(size, b.Size())
	if hi <= old {
		return nil
	}
	var err error
	if blk.IsAligned(old, hi, s.drv.align) {
		err = s.driverZero(r, old, hi-old, 0)
	} else {
		err = s.zeroPadded(r, old, hi-old, 0)
	}
	if err != nil {
		return errors.Join(err, s.drv.Resize(ctx, old, blk.PreallocOff))
	}
	return nil
}
