package graph

import "qblockd/schema/types"

// SetWriteThreshold lets the first write (or discard) that ends beyond offset t emit
// BLOCK_WRITE_THRESHOLD; the threshold is then 0, which means none.
func (s *IO) SetWriteThreshold(t uint64) {
	s.threshold.Store(t)
	s.n.Bump()
}

// WriteThreshold is the offset set, 0 for none.
func (s *IO) WriteThreshold() uint64 { return s.threshold.Load() }

// thresholdExceeded reports that a write ended at end, beyond the threshold. Of requests
// that do so at once only one reports.
func (s *IO) thresholdExceeded(end uint64) {
	t := s.threshold.Load()
	if t == 0 || end <= t || !s.threshold.CompareAndSwap(t, 0) {
		return
	}
	s.n.Bump()
	s.n.g.sink.Emit(&types.BlockWriteThresholdEvent{NodeName: s.n.name, AmountExceeded: end - t, WriteThreshold: t})
}
