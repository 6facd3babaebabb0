// Package null is the drivers null-co and null-aio: storage that takes everything and
// keeps nothing, to measure what is above it. Both are the same here.
package null

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

const defaultSize = 1 << 30

// disk is a node's driver.
type disk struct {
	size    int64
	latency time.Duration // that each read, write and flush takes
	zeroes  bool          // reads give zeroes; else they leave the buffer alone
}

// open opens a node of null-co or null-aio. The size (default 1 GiB) is rounded up to sectors. It
// never blocks.
func open(o *driver.Opening, opts *types.BlockdevOptionsNull) (graph.Driver, error) {
	size, latency := types.Or(opts.Size, defaultSize), types.Or(opts.LatencyNs, 0)
	switch {
	case size < 0:
		return nil, errors.New("Parameter 'size' expects a non-negative number below 2^64")
	case size > blk.MaxSize:
		return nil, errors.New("Could not refresh total sector count: File too large")
	case latency > math.MaxInt64:
		return nil, errors.New("latency-ns is invalid")
	}
	return &disk{
		size:    blk.AlignUp(size, blk.SectorSize),
		latency: time.Duration(latency),
		// What an image names must not show what was in the reader's buffer before: memory of the
		// daemon, data of other disks.
		zeroes: types.Or(opts.ReadZeroes, false) || o.Admit != nil,
	}, nil
}

var timers = sync.Pool{New: func() any { return time.NewTimer(time.Hour) }}

// pause takes the time that a request takes. The end of the request's context cuts it short.
func (d *disk) pause(r *blk.Req) error {
	if d.latency == 0 {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	t := timers.Get().(*time.Timer)
	t.Reset(d.latency)
	defer func() {
		t.Stop()
		timers.Put(t)
	}()
	select {
	case <-t.C:
		return nil
	case <-r.Done():
		return context.Cause(r.Ctx)
	}
}

// Caps implements graph.Driver.
func (d *disk) Caps() graph.Caps {
	return graph.Caps{WriteFlags: blk.FUA | blk.WriteUnchanged, Instant: d.latency == 0}
}

// Size implements graph.Driver.
func (d *disk) Size() int64 { return d.size }

// Close implements graph.Driver.
func (d *disk) Close() error { return nil }

// ReadAt implements graph.Driver.
func (d *disk) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if d.zeroes {
		v.Zero()
	}
	return d.pause(r)
}

// WriteAt implements graph.Writer.
func (d *disk) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error { return d.pause(r) }

// Flush implements graph.Flusher.
func (d *disk) Flush(r *blk.Req) error { return d.pause(r) }

// Status implements graph.BlockStatuser: nothing is stored; with read-zeroes it is known what reads
// give.
func (d *disk) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return blk.Extent{N: n, Zero: d.zeroes, OffValid: true, MapOff: off}, nil
}

// ActualSize implements graph.Sizer.
func (d *disk) ActualSize() (int64, error) { return 0, nil }
