// Package blkverify is the filter blkverify, for tests: it has two children that should hold the
// same, does everything on both, and compares what they give.
//
// A difference is a bug in one of them. QEMU ends its process then; here the request
// fails, and so does every later one.
package blkverify

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

type filter struct {
	node   *graph.Node
	differ atomic.Bool
	// writing is held to read and to write: what runs at the same time must come in the same order
	// on both.
	writing sync.RWMutex
}

func (d *filter) raw() *graph.Edge  { return d.node.FilteredChild() }
func (d *filter) test() *graph.Edge { return d.node.Child("test") }

// Caps implements graph.Driver.
func (d *filter) Caps() graph.Caps {
	return graph.Caps{WriteFlags: blk.WriteUnchanged}
}

// Size implements graph.Driver: that of what is tested.
func (d *filter) Size() int64 {
	if c := d.test(); c != nil {
		return c.Size()
	}
	return 0
}

// Close implements graph.Driver.
func (d *filter) Close() error { return nil }

// wrong reports a difference and makes it one for good.
func (d *filter) wrong(what string, off, n int64, args ...any) error {
	if !d.differ.Swap(true) {
		slog.Error("blkverify: "+what, append([]any{"node", d.node.Name(), "offset", off, "bytes", n}, args...)...)
	}
	return syscall.EIO
}

// both does something on both children.
func (d *filter) both(off, n int64, f func(e *graph.Edge) error) error {
	if d.differ.Load() {
		return syscall.EIO
	}
	raw := f(d.raw())
	test := f(d.test())
	if blk.Errno(raw) != blk.Errno(test) {
		return d.wrong("errors differ", off, n, "raw", raw, "test", test)
	}
	return test
}

// ReadAt implements graph.Driver.
func (d *filter) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	d.writing.RLock()
	defer d.writing.RUnlock()
	n := v.Len()
	buf := blk.GetBuf(int(n), d.raw().Caps().Limits.MemAlign)
	defer blk.PutBuf(buf)
	raw := d.raw()
	err := d.both(off, n, func(e *graph.Edge) error {
		if e == raw {
			return e.ReadAt(r, blk.Buf(buf.B), off, f)
		}
		return e.ReadAt(r, v, off, f)
	})
	if err != nil {
		return err
	}
	at := int64(0)
	for _, b := range v.AppendTo(nil) {
		if !bytes.Equal(b, buf.B[at:at+int64(len(b))]) {
			return d.wrong("contents differ", off, n)
		}
		at += int64(len(b))
	}
	return nil
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	d.writing.Lock()
	defer d.writing.Unlock()
	return d.both(off, v.Len(), func(e *graph.Edge) error { return e.WriteAt(r, v, off, f) })
}

// Flush implements graph.Flusher. What is only compared with need not be safe.
func (d *filter) Flush(r *blk.Req) error { return d.test().Flush(r) }

// Resize implements graph.Resizer.
func (d *filter) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	was := d.raw().Size()
	if err := d.raw().Resize(ctx, size, true, m); err != nil {
		return err
	}
	err := d.test().Resize(ctx, size, true, m)
	if err != nil {
		err = errors.Join(err, d.raw().Resize(ctx, was, true, blk.PreallocOff))
	}
	return err
}

// EdgeClaim implements graph.Permer.
func (d *filter) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	return perm.Default(role, up, !readOnly, false)
}

// ImageInfo implements graph.Informer.
func (d *filter) ImageInfo(info *types.ImageInfo) { d.raw().ShowImage(info) }
