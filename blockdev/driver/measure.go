package driver

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// MeasureFunc tells how large the file of an image would be, from the driver's branch of
// QblockdMeasureOptions. It blocks as long as the storage of the source does.
type MeasureFunc func(ctx context.Context, m *Measuring, o any) (*types.BlockMeasureInfo, error)

// Measures makes a MeasureFunc of a function of the branch's type, which gets nil where the driver
// has none.
func Measures[M any](f func(ctx context.Context, m *Measuring, o M) (*types.BlockMeasureInfo, error)) MeasureFunc {
	return func(ctx context.Context, m *Measuring, o any) (*types.BlockMeasureInfo, error) {
		u, _ := o.(M)
		return f(ctx, m, u)
	}
}

// Measuring is what Measure gets beside the options.
type Measuring struct {
	Size int64 // of the disk, bytes
	// Source has what would be copied; nil: nothing is known of that.
	Source *graph.Root
	// Bitmaps are those of the source that would be stored, nil if it can have none.
	Bitmaps []MeasuredBitmap
}

// MeasuredBitmap is a bitmap of which a copy would be stored.
type MeasuredBitmap struct {
	Name        string
	Granularity int64 // bytes
}

// Each calls f for the parts of the source, in order, that hold data in some layer of its backing
// chain and do not read as zeroes for certain.
func (m *Measuring) Each(ctx context.Context, f func(off, n int64)) error {
	for off := int64(0); off < m.Size; {
		x, err := m.status(ctx, off)
		if err != nil {
			return err
		}
		if x.N <= 0 { // the source has become shorter
			return nil
		}
		if x.Data && x.Allocated && !x.Zero {
			f(off, x.N)
		}
		off += x.N
	}
	return nil
}

// status is one unit of work, so that nobody who drains the source waits for all of it.
func (m *Measuring) status(ctx context.Context, off int64) (blk.Extent, error) {
	r, err := m.Source.Begin(ctx)
	if err != nil {
		return blk.Extent{}, err
	}
	defer m.Source.End(r)
	return m.Source.StatusAbove(r, nil, false, off, m.Size-off)
}
