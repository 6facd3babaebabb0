package blockdev

import (
	"context"
	"errors"
	"fmt"
	"math"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Measure is the body of x-qblockd-measure. It asks the source, if one is named, for all of its
// block status; who drains the source does not wait for that.
func (m *Manager) Measure(ctx context.Context, a *types.QblockdMeasureOptions) (_ *types.BlockMeasureInfo, err error) {
	d := m.drivers[a.Driver]
	switch {
	case d == nil || d.Measure == nil:
		return nil, fmt.Errorf("Block driver '%s' does not support size measurement", a.Driver)
	case (a.Size == nil) == (a.NodeName == nil):
		return nil, errors.New("Either 'size' or 'node-name' must be specified")
	case a.Size != nil && *a.Size > math.MaxInt64:
		return nil, fmt.Errorf("Invalid image size specified. Must be between 0 and %d.", math.MaxInt64)
	}
	x := &driver.Measuring{}
	if a.Size != nil {
		x.Size = int64(*a.Size)
		return d.Measure(ctx, x, a.U)
	}
	x.Source, err = m.OpenRoot(ctx, &types.BlockdevRef{Reference: a.NodeName}, graph.RootSpec{
		EdgeName: "root", Claim: perm.Claim{Need: perm.ConsistentRead, Share: perm.All}, Kind: graph.KindBackend, Ctx: ctx,
	})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.g.CloseRoot(context.WithoutCancel(ctx), x.Source)) }()
	n := x.Source.Edge().Node()
	x.Size = n.Size()
	x.Bitmaps = measuredBitmaps(n)
	return d.Measure(ctx, x, a.U)
}

// measuredBitmaps are the bitmaps of n that an image of its own has or is going to have, nil if it
// can have none.
func measuredBitmaps(n *graph.Node) []driver.MeasuredBitmap {
	const coarsest = 1 << 31 // bytes: what the image has room for is not what is asked
	s, ok := n.Driver().(graph.BitmapStore)
	if !ok || s.CanStoreBitmap("", coarsest, 0) != nil {
		return nil
	}
	l := []driver.MeasuredBitmap{}
	for _, b := range n.Bitmaps().All() {
		if b.Persistent() && !b.Inconsistent() {
			l = append(l, driver.MeasuredBitmap{Name: b.Name(), Granularity: b.Bits().Granularity()})
		}
	}
	return l
}
