package chain

import (
	"context"
	"errors"
	"log/slog"

	"qblockd/graph"
	"qblockd/graph/blk"
)

// TakeOut takes a job's filter, and what else the job has in the graph, out of it: giveBack lets a
// transaction give back the job's claims, freezes and roots. It cannot fail:
//
// While the job ran its filter may have shared more than its parents do, or have kept them apart
// from what others do beside it. Nodes that were added meanwhile can rely on that, and then nothing
// but the filter stands between the two. It stays in this case, with nothing of the job in it, as
// one that passes everything on, until its last parent goes. Giving back claims only loosens them,
// so that much is always possible.
func TakeOut(job string, filter *graph.Node, giveBack func(tx *graph.Tx) error) {
	err := leave(filter, giveBack, true)
	if err == nil || errors.Is(err, blk.ErrClosed) {
		return // at the end of the daemon the graph may be closed already; there is nothing to give back then
	}
	slog.Warn("the filter of a job stays until its last user goes", "job", job, "node", filter.Name(), "error", err)
	if err = leave(filter, giveBack, false); err != nil && !errors.Is(err, blk.ErrClosed) {
		slog.Error("a job cannot be taken out of the graph", "job", job, "node", filter.Name(), "error", err)
	}
}

func leave(filter *graph.Node, giveBack func(tx *graph.Tx) error, remove bool) error {
	tx := filter.Graph().Begin(context.Background())
	defer tx.Abort()
	if err := giveBack(tx); err != nil {
		return err
	}
	if remove {
		if err := tx.RemoveFilter(filter); err != nil {
			return err
		}
	}
	return tx.Commit()
}
