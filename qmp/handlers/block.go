package handlers

import (
	"context"

	"qblockd/blockdev"
	"qblockd/blockdev/export"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/visible"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// BlockCore executes the commands of module block-core that look at or change nodes.
type BlockCore struct {
	Nodes   *blockdev.Manager
	Exports *export.Table
	Jobs    *jobs.Manager // those that snapshots pause
}

// none is the answer about devices for guests: there are none.
var none = types.Raw("[]")

// QueryBlock lists the devices.
func (b BlockCore) QueryBlock(context.Context) (types.Raw, error) { return none, nil }

// QueryBlockstats shows the counters of the devices or of the nodes.
func (b BlockCore) QueryBlockstats(_ context.Context, a *types.QueryBlockstatsArgs) (types.Raw, error) {
	if !types.Or(a.QueryNodes, false) {
		return none, nil
	}
	return b.Nodes.AppendNodeStats(nil), nil
}

// BlockResize changes the size of a node.
func (b BlockCore) BlockResize(ctx context.Context, a *types.BlockResizeArgs) error {
	return b.Nodes.Resize(ctx, a.Device, a.NodeName, a.Size,
		blk.Prealloc(types.Or(a.XQblockdPreallocation, types.PreallocModeOff)))
}

// QueryNamedBlockNodes lists the nodes.
func (b BlockCore) QueryNamedBlockNodes(ctx context.Context, a *types.QueryNamedBlockNodesArgs) (types.Raw, error) {
	return b.Nodes.NamedNodes(types.Or(a.Flat, false), func(n int64) error { return qmp.LargeReply(ctx, n) })
}

// XDebugQueryBlockGraph shows the graph.
func (b BlockCore) XDebugQueryBlockGraph(context.Context) (*types.XDbgBlockGraph, error) {
	return b.Nodes.DebugGraph(b.Jobs.BlockJobs()...), nil
}

// BlockdevAdd opens a node.
func (b BlockCore) BlockdevAdd(ctx context.Context, a *types.BlockdevOptions) error {
	return b.Nodes.Add(ctx, a)
}

// BlockdevReopen gives nodes other options.
func (b BlockCore) BlockdevReopen(ctx context.Context, a *types.BlockdevReopenArgs) error {
	r := b.Nodes.Reopen(a.Options)
	return b.Jobs.Around(visible.NodeReopened, func() (l []*graph.Node) {
		for _, n := range r.Nodes() {
			l = append(l, n.NodesBelow()...)
		}
		return l
	}, func() error { return r.Run(ctx) })
}

// BlockdevDel closes a node.
func (b BlockCore) BlockdevDel(ctx context.Context, a *types.BlockdevDelArgs) error {
	return b.Nodes.Del(ctx, a.NodeName)
}

// BlockdevSetActive leaves the image of a node to others, or takes it back.
func (b BlockCore) BlockdevSetActive(ctx context.Context, a *types.BlockdevSetActiveArgs) error {
	return b.Nodes.SetActive(ctx, a)
}

// XBlockdevChange gives a node one more child, or takes one from it.
func (b BlockCore) XBlockdevChange(ctx context.Context, a *types.XBlockdevChangeArgs) error {
	n, err := b.Nodes.ChangeChild(ctx, a)
	if err == nil {
		b.Jobs.Show(visible.ChildrenChanged, n)
	}
	return err
}

// XQblockdMeasure tells how large an image would be.
func (b BlockCore) XQblockdMeasure(
	ctx context.Context, a *types.QblockdMeasureOptions,
) (*types.BlockMeasureInfo, error) {
	return b.Nodes.Measure(ctx, a)
}

// BlockSetWriteThreshold sets the offset that raises an event when it is written.
func (b BlockCore) BlockSetWriteThreshold(ctx context.Context, a *types.BlockSetWriteThresholdArgs) error {
	return b.Nodes.SetWriteThreshold(ctx, a.NodeName, a.WriteThreshold)
}

// XBlockdevSetIothread moves a node into an iothread.
func (b BlockCore) XBlockdevSetIothread(ctx context.Context, a *types.XBlockdevSetIothreadArgs) error {
	var n *graph.Node
	hold, err := b.Nodes.Graph().Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = b.Nodes.Find(a.NodeName)
		return []*graph.Node{n}, err
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	return b.Exports.SetIothread(n, a.Iothread.S, types.Or(a.Force, false))
}
