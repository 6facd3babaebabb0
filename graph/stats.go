package graph

import (
	"errors"
	"sync/atomic"
	"time"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// Stats are the counters that query-blockstats shows of a node. As in QEMU a node knows only where
// its farthest write ended; requests are counted per root, by an Account.
func (s *IO) Stats() *types.BlockDeviceStats {
	return &types.BlockDeviceStats{WrHighestOffset: s.wrHighest.Load(), TimedStats: []*types.BlockDeviceTimedStats{}}
}

// WrHighestOffset is the end of the farthest write, in bytes.
func (s *IO) WrHighestOffset() int64 { return s.wrHighest.Load() }

// Account counts the requests that enter through a root: what export.Table.Stats tells of an
// export, and what query-blockstats is to show of a named backend. The zero value counts nothing
// but successes as activity; see the fields.
type Account struct {
	// CountInvalid, CountFailed: such requests count as activity, and failed ones in the times.
	// Constant in use.
	CountInvalid, CountFailed bool

	kinds [acctKinds]acctKind
	last  atomic.Int64 // end of the last request that counts as activity, ns since acctEpoch; 0: none yet
}

type acctOp uint8

const (
	acctRead acctOp = iota
	acctWrite
	acctFlush
	acctUnmap
	acctKinds
)

type acctKind struct {
	bytes, ops, merged, failed, invalid, ns atomic.Int64
}

var acctEpoch = time.Now()

// start is the moment a request begins. A nil Account counts nothing.
func (a *Account) start() time.Duration {
	if a == nil {
		return 0
	}
	return time.Since(acctEpoch)
}

// done counts a request of n bytes that began at start and ended with err. What would have blocked
// was not there.
func (a *Account) done(op acctOp, start time.Duration, n int64, err error) {
	if a != nil {
		a.count(op, start, n, err)
	}
}

func (a *Account) count(op acctOp, start time.Duration, n int64, err error) {
	if err != nil && errors.Is(err, blk.ErrWouldBlock) {
		return
	}
	k := &a.kinds[op]
	now := time.Since(acctEpoch)
	active := true
	switch {
	case err == nil:
		k.ops.Add(1)
		k.bytes.Add(n)
		k.ns.Add(int64(now - start))
	case errors.Is(err, blk.ErrOutOfRange) || errors.Is(err, blk.ErrReadOnly):
		k.invalid.Add(1)
		active = a.CountInvalid
	default:
		k.failed.Add(1)
		if active = a.CountFailed; active {
			k.ns.Add(int64(now - start))
		}
	}
	if active {
		a.last.Store(int64(now))
	}
}

// Merged counts requests of the client that were merged into others before they came here.
func (a *Account) Merged(reads, writes, unmaps int64) {
	a.kinds[acctRead].merged.Add(reads)
	a.kinds[acctWrite].merged.Add(writes)
	a.kinds[acctUnmap].merged.Add(unmaps)
}

// Stats are the counters as query-blockstats shows them; the end of the farthest write is n's, if n
// is not nil.
func (a *Account) Stats(n *Node) *types.BlockDeviceStats {
	rd, wr, fl, un := &a.kinds[acctRead], &a.kinds[acctWrite], &a.kinds[acctFlush], &a.kinds[acctUnmap]
	s := &types.BlockDeviceStats{
		RdBytes: rd.bytes.Load(), WrBytes: wr.bytes.Load(), UnmapBytes: un.bytes.Load(),
		RdOperations: rd.ops.Load(), WrOperations: wr.ops.Load(),
		FlushOperations: fl.ops.Load(), UnmapOperations: un.ops.Load(),
		RdTotalTimeNs: rd.ns.Load(), WrTotalTimeNs: wr.ns.Load(),
		FlushTotalTimeNs: fl.ns.Load(), UnmapTotalTimeNs: un.ns.Load(),
		RdMerged: rd.merged.Load(), WrMerged: wr.merged.Load(), UnmapMerged: un.merged.Load(),
		FailedRdOperations: rd.failed.Load(), FailedWrOperations: wr.failed.Load(),
		FailedFlushOperations: fl.failed.Load(), FailedUnmapOperations: un.failed.Load(),
		InvalidRdOperations: rd.invalid.Load(), InvalidWrOperations: wr.invalid.Load(),
		InvalidFlushOperations: fl.invalid.Load(), InvalidUnmapOperations: un.invalid.Load(),
		AccountInvalid: a.CountInvalid, AccountFailed: a.CountFailed,
		TimedStats: []*types.BlockDeviceTimedStats{},
	}
	if last := a.last.Load(); last > 0 {
		idle := int64(time.Since(acctEpoch)) - last
		s.IdleTimeNs = &idle
	}
	if n != nil {
		s.WrHighestOffset = n.io.wrHighest.Load()
	}
	return s
}
