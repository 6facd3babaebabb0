package handlers

import (
	"context"

	"qblockd/qmp"
	"qblockd/qmp/chardev"
	"qblockd/schema/types"
)

// Char executes the commands of module char.
type Char struct{ Devices *chardev.Table }

// QueryChardev lists the character devices.
func (c Char) QueryChardev(context.Context) ([]*types.ChardevInfo, error) {
	return c.Devices.Query(), nil
}

// QueryChardevBackends lists the kinds of devices.
func (c Char) QueryChardevBackends(context.Context) ([]*types.ChardevBackendInfo, error) {
	return c.Devices.Backends(), nil
}

// RingbufWrite appends to a ring buffer.
func (c Char) RingbufWrite(_ context.Context, a *types.RingbufWriteArgs) error {
	return c.Devices.RingbufWrite(a.Device, a.Data, a.Format)
}

// RingbufRead takes bytes out of a ring buffer.
func (c Char) RingbufRead(ctx context.Context, a *types.RingbufReadArgs) (string, error) {
	const escaped = 6 // bytes that one becomes at most
	if err := qmp.LargeReply(ctx, escaped*min(max(a.Size, 0), c.Devices.RingbufHas(a.Device))); err != nil {
		return "", err
	}
	return c.Devices.RingbufRead(a.Device, a.Size, a.Format)
}

// ChardevAdd makes a device.
func (c Char) ChardevAdd(ctx context.Context, a *types.ChardevAddArgs) (*types.ChardevReturn, error) {
	return c.Devices.Add(ctx, a.ID, &a.Backend)
}

// ChardevChange puts another device in the place of one without a user.
func (c Char) ChardevChange(ctx context.Context, a *types.ChardevChangeArgs) (*types.ChardevReturn, error) {
	return c.Devices.Change(ctx, a.ID, &a.Backend)
}

// ChardevRemove removes a device without a user.
func (c Char) ChardevRemove(_ context.Context, a *types.ChardevRemoveArgs) error {
	return c.Devices.Remove(a.ID)
}

// ChardevSendBreak sends a break signal.
func (c Char) ChardevSendBreak(_ context.Context, a *types.ChardevSendBreakArgs) error {
	return c.Devices.SendBreak(a.ID)
}
