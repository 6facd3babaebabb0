package handlers

import (
	"context"
	"slices"

	"qblockd/qmp"
	"qblockd/schema"
	"qblockd/schema/types"
)

// Control executes the commands of module control.
type Control struct {
	// Version is what query-version reports.
	Version qmp.Version
	// Shutdown shuts the daemon down in order but for the monitors: no further command
	// starts, jobs are cancelled, exports closed, data flushed, events out. It blocks until that is
	// done. The reply to quit follows it.
	Shutdown func(ctx context.Context)
	// Exit is called when the reply to quit is on its way. It must not wait for sessions.
	Exit func()
}

// QmpCapabilities ends the negotiation of the client's session.
func (Control) QmpCapabilities(ctx context.Context, a *types.QmpCapabilitiesArgs) error {
	return qmp.Negotiate(ctx, slices.Contains(a.Enable, types.QMPCapabilityOob))
}

// QueryVersion tells the version.
func (c Control) QueryVersion(context.Context) (*types.VersionInfo, error) {
	v := c.Version
	return &types.VersionInfo{
		Qemu:    types.VersionTriple{Major: int64(v.Major), Minor: int64(v.Minor), Micro: int64(v.Micro)},
		Package: v.Package,
	}, nil
}

// QueryCommands lists the commands of the schema.
func (Control) QueryCommands(context.Context) (types.Raw, error) {
	return types.Raw(schema.QueryCommands()), nil
}

// Quit shuts down; the reply is the last message.
func (c Control) Quit(ctx context.Context) error {
	c.Shutdown(ctx)
	qmp.AfterReply(ctx, c.Exit)
	return nil
}

// Introspect executes the commands of module introspect.
type Introspect struct{}

// QueryQmpSchema shows the schema.
func (Introspect) QueryQmpSchema(context.Context) (types.Raw, error) {
	return types.Raw(schema.QueryQMPSchema()), nil
}
