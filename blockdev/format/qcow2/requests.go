package qcow2

import "qblockd/graph/blk"

// requests are those for the guest disk. The exported ones take mu, the others need it where they
// do no I/O of data.
type requests struct {
	bitmaps

	// Memory of requests under way, taken with no lock held. Who waits for one of these may hold
	// parts of those before it.
	zipping   blk.Budget
	copying   blk.Budget
	unzipping blk.Budget
	decoding  blk.Budget

	inflight inflight // +checklocks:mu
	unz      unzipped // +checklocks:mu
}
