// Package preallocate is the filter preallocate: when a write makes its file longer, it makes the
// file longer still, in large steps, so that the file system has less to do at each write and finds
// room in larger pieces. What was not needed is given back when nobody may write any more.
//
//	data            preallocated zeroes
//	|---------------|-------------------|
//	0            dataEnd             fileEnd
//
// Parents see the file end at dataEnd. Both ends are known only while parents may write and resize,
// and nobody else does.
package preallocate

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

const (
	defaultAlign = 1 << 20
	defaultSize  = 128 << 20
)

// steps say how much is preallocated.
type steps struct{ align, size int64 }

type filter struct {
	graph.Passthrough
	steps atomic.Pointer[steps]

	growing sync.Mutex // held while the file is made longer; taken before mu
	mu      sync.Mutex
	// parents may write and resize
	active bool // +checklocks:mu
	// -1: not known, that of the file
	dataEnd int64 // +checklocks:mu
	// of what grew or was going to be written; -1: not known, nothing grew yet
	fileEnd int64 // +checklocks:mu

	next bool // what active will be; between PermPrepare and PermCommit
}

func open(o *driver.Opening, u *types.BlockdevOptionsPreallocate) (graph.Driver, error) {
	d := &filter{Passthrough: graph.Through(o.Node), dataEnd: -1, fileEnd: -1}
	s, err := d.read(u)
	if err != nil {
		return nil, err
	}
	d.steps.Store(s)
	return d, nil
}

func (d *filter) read(u *types.BlockdevOptionsPreallocate) (*steps, error) {
	s := &steps{types.Or(u.PreallocAlign, defaultAlign), types.Or(u.PreallocSize, defaultSize)}
	below := max(d.Below().Caps().Limits.RequestAlign, 1)
	negative := func(name string) error {
		return fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64", name)
	}
	switch {
	case s.align < 0:
		return nil, negative("prealloc-align")
	case s.size < 0:
		return nil, negative("prealloc-size")
	case s.align%blk.SectorSize != 0:
		return nil, fmt.Errorf("prealloc-align parameter of preallocate filter is not aligned to %d", blk.SectorSize)
	case s.align%below != 0:
		return nil, fmt.Errorf("prealloc-align parameter of preallocate filter is not aligned to underlying node request alignment (%d)", below)
	}
	s.align = max(s.align, below)
	return s, nil
}

func reopen(open graph.Driver, u *types.BlockdevOptionsPreallocate, _ *graph.Options) (graph.Participant, error) {
	d := open.(*filter)
	s, err := d.read(u)
	if err != nil {
		return nil, err
	}
	return graph.OnCommit(func() { d.steps.Store(s) }), nil
}

// Size implements graph.Driver: where the data end.
func (d *filter) Size() int64 {
	d.mu.Lock()
	end := d.dataEnd
	d.mu.Unlock()
	if end >= 0 {
		return end
	}
	return d.Passthrough.Size()
}

// extending does something that writes up to end; before, it makes the file longer if it ends there
// or earlier.
func (d *filter) extending(r *blk.Req, end int64, do func() error) error {
	d.mu.Lock()
	longer := false
	if d.active {
		if d.dataEnd < 0 {
			d.dataEnd = d.Passthrough.Size()
		}
		longer = end > d.dataEnd
	}
	d.mu.Unlock()
	if longer {
		if r.NoWait {
			return blk.ErrWouldBlock
		}
		d.grow(r, end)
	}
	if err := do(); err != nil {
		return err
	}
	d.wrote(end)
	return nil
}

// grow makes the file longer. That it cannot is no reason for a write to fail.
func (d *filter) grow(r *blk.Req, end int64) {
	d.growing.Lock()
	defer d.growing.Unlock()
	d.mu.Lock()
	file := d.fileEnd
	if file < 0 {
		file = d.Passthrough.Size()
	}
	enough := end <= file
	if enough {
		d.fileEnd = file
	}
	d.mu.Unlock()
	if enough {
		return
	}
	s := d.steps.Load()
	lo, hi := blk.AlignUp(file, max(d.Below().Caps().Limits.RequestAlign, 1)), alignUp(end+s.size, s.align)
	err := d.Below().Zero(r, lo, hi-lo, blk.NoFallback)
	d.mu.Lock()
	if d.fileEnd = hi; err != nil {
		d.fileEnd = end // the write makes it so; the next growth must not zero that
	}
	d.mu.Unlock()
}

// alignUp is blk.AlignUp for any alignment; 0 is none.
func alignUp(n, align int64) int64 {
	if align == 0 {
		return n
	}
	return (n + align - 1) / align * align
}

// wrote notes where the data end after a write.
func (d *filter) wrote(end int64) {
	d.mu.Lock()
	if d.active && end > d.dataEnd {
		d.dataEnd = end
		if d.fileEnd >= 0 {
			d.fileEnd = max(d.fileEnd, end)
		}
	}
	d.mu.Unlock()
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.extending(r, off+v.Len(), func() error { return d.Below().WriteAt(r, v, off, f) })
}

// Zero implements graph.Zeroer.
func (d *filter) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return d.extending(r, off+n, func() error { return d.Below().Zero(r, off, n, f) })
}

// CopyFrom implements graph.CopyRanger.
func (d *filter) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	return d.extending(r, off+blk.Total(src), func() error { return d.Below().CopyFrom(r, off, src, f) })
}

// Resize implements graph.Resizer.
func (d *filter) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	d.growing.Lock()
	defer d.growing.Unlock()
	if err := d.Below().Resize(ctx, size, true, m); err != nil {
		return err
	}
	d.mu.Lock()
	if d.active {
		d.dataEnd, d.fileEnd = size, size
	}
	d.mu.Unlock()
	return nil
}

// PermPrepare implements graph.PermTaker: who may no longer write gives back what was not needed.
func (d *filter) PermPrepare(ctx context.Context, c perm.Claim) error {
	d.next = writes(c.Need)
	d.mu.Lock()
	end, crop := d.dataEnd, d.active && !d.next && d.fileEnd >= 0 // growth was tried
	d.mu.Unlock()
	if !crop || d.Below() == nil {
		return nil
	}
	if err := d.Below().Resize(ctx, end, true, blk.PreallocOff); err != nil {
		return err
	}
	d.mu.Lock()
	d.fileEnd = end
	d.mu.Unlock()
	return nil
}

func writes(p perm.Perm) bool { return p&(perm.Write|perm.Resize) == perm.Write|perm.Resize }

// PermCommit implements graph.PermTaker.
func (d *filter) PermCommit() {
	d.mu.Lock()
	if d.active = d.next; !d.active {
		d.dataEnd, d.fileEnd = -1, -1
	}
	d.mu.Unlock()
}

// PermAbort implements graph.PermTaker.
func (d *filter) PermAbort() {}

// EdgeClaim implements graph.Permer: nobody else may write to the file or change its size while the
// filter does.
func (d *filter) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	c := perm.Default(role, up, !readOnly, false)
	if writes(c.Need) {
		c.Share &^= perm.Write | perm.Resize
	}
	return c
}
