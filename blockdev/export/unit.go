package export

import (
	"context"

	"qblockd/graph/blk"
)

// Gate is where units of work begin and end: a graph.Root.
type Gate interface {
	TryBegin() *blk.Req
	Begin(ctx context.Context) (*blk.Req, error)
	End(r *blk.Req)
}

// Unit is a unit of work that may take a while: it has passed the gate of a root, and has a worker
// of the export's group, if that has one.
type Unit struct {
	*blk.Req
	gate  Gate
	group Workers // nil: none
}

// Begin waits, no longer than ctx, for a worker of the group that workers tells (nil: none) and for
// the gate, and enters both. Nobody waits for one of them while holding the other: a drained device
// does not take the workers of others.
func Begin(ctx context.Context, gate Gate, workers func() Workers) (Unit, error) {
	for {
		group := workers()
		if group == nil {
			u, err := gate.Begin(ctx)
			return Unit{Req: u, gate: gate}, err
		}
		if err := group.Enter(ctx); err != nil {
			return Unit{}, err
		}
		if u := gate.TryBegin(); u != nil {
			return Unit{u, gate, group}, nil
		}
		group.Leave()
		u, err := gate.Begin(ctx)
		if err != nil {
			return Unit{}, err
		}
		gate.End(u) // the gate is open again
	}
}

// End ends the unit.
func (u Unit) End() {
	u.gate.End(u.Req)
	if u.group != nil {
		u.group.Leave()
	}
}
