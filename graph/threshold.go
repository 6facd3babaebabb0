package graph

import "qblockd/schema/types"

// SetWriteThreshold lets the first write (or discard) that ends beyond offset t emit
// BLOCK_WRITE_THRESHOLD; the threshold is then 0, which means none.
func (n *Node) SetWriteThreshold(t uint64) {
	n.io.threshold.Store(t)
	n.Bump()
}

// WriteThreshold is the offset set, 0 for none.
func (n *Node) WriteThreshold() uint64 { return n.io.threshold.Load() }

// thresholdExceeded reports that a write ended at end, beyond the threshold. Of requests
// that do so at once only one reports.
func (n *Node) thresholdExceeded(end uint64) {
	t := n.io.threshold.Load()
	if t == 0 || end <= t || !n.io.threshold.CompareAndSwap(t, 0) {
		return
	}
	n.Bump()
	n.g.sink.Emit(&types.BlockWriteThresholdEvent{NodeName: n.name, AmountExceeded: end - t, WriteThreshold: t})
}
