package luks

import (
	"context"
	"math"

	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/driver"
	"qblockd/schema/types"
)

// measure tells how large an image is: nothing in it is left out.
func measure(_ context.Context, m *driver.Measuring, o *types.QblockdMeasureLUKS) (*types.BlockMeasureInfo, error) {
	room, err := luks.Room(o)
	if err != nil {
		return nil, err
	}
	if m.Size > math.MaxInt64-room {
		return nil, errTooLarge
	}
	return &types.BlockMeasureInfo{Required: room + m.Size, FullyAllocated: room + m.Size}, nil
}
