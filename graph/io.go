package graph

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// The I/O path. Every request of every layer enters a node through one of the methods of Edge in
// the io_*.go files, which check it, bring it into the form that the driver can take
// (alignment, sizes, flags), keep apart what must not overlap, call the driver and keep
// the books. Drivers are called from nowhere else. All methods need a unit of work (Root.Begin)
// and work in the calling goroutine; none takes the graph's locks.
//
// Two kinds of parents are told apart. A request through a Root must lie inside the node:
// blk.ErrOutOfRange. A request of a node to its child may reach beyond the child's end:
// reads give zeroes there, writes make the child grow if the edge claims resize.
//
// With Req.NoWait a request that could not be finished by a single call of the driver returns
// blk.ErrWouldBlock before anything is changed; an answer of that kind from the driver is passed
// on and nothing is counted.

// ioState is the data plane's part of a node.
type ioState struct {
	// Set by opened.
	drv     Driver
	writer  Writer
	zeroer  Zeroer
	flusher Flusher
	discard Discarder
	status  BlockStatuser
	mapper  Mapper
	copier  CopyRanger
	resizer Resizer
	debug   Debugger
	// Set by opened and refreshed, constant while requests run.
	caps     *Caps
	align    int64 // Caps.Limits.RequestAlign, at least 1
	maxIO    int64 // Caps.Limits.MaxTransfer, a multiple of align, never 0
	memAlign int   // Caps.Limits.MemAlign, at least 1

	shown atomic.Pointer[Caps] // caps for those who are no requests

	copying blk.Budget // of what copy-on-read has in memory
	track   tracker
	flush   flushState

	threshold  atomic.Uint64 // see threshold.go
	wrHighest  atomic.Int64  // end of the farthest write
	statusData dataCache     // see io_status.go
	dirty      dirtySet      // see dirty.go
}

// opened is called once, by SetDriver, on the still hidden node.
func (s *ioState) opened(n *Node) {
	s.copying.Limit = copyingMax
	s.guard(n)
	s.debug, _ = n.drv.(Debugger)
	s.refreshed(n)
}

// refreshed asks the driver's properties again, after a reopen, while the node is drained.
func (s *ioState) refreshed(n *Node) {
	if c := s.drv.Caps(); s.caps == nil || c != *s.caps {
		s.caps = &c
		s.shown.Store(&c)
	}
	l := &s.caps.Limits
	s.align = max(l.RequestAlign, 1)
	s.memAlign = max(l.MemAlign, 1)
	s.maxIO = math.MaxInt64
	if l.MaxTransfer > 0 {
		s.maxIO = max(blk.AlignDown(l.MaxTransfer, s.align), s.align)
	}
	s.statusData.drop()
	if invariantsOn {
		s.checkCaps(n)
	}
}

// checkCaps panics where the driver claims what it cannot do or limits make no sense.
func (s *ioState) checkCaps(n *Node) {
	l := &s.caps.Limits
	pow2 := func(x int64) bool { return x >= 0 && x&(x-1) == 0 }
	switch {
	case s.caps.WriteFlags != 0 && s.writer == nil, s.caps.ZeroFlags != 0 && s.zeroer == nil:
		panic("graph: driver " + n.DriverName() + " claims flags without the interface behind them")
	case !pow2(l.RequestAlign), !pow2(int64(l.MemAlign)), !pow2(l.ZeroAlign), !pow2(l.DiscardAlign), !pow2(l.ClusterSize):
		panic("graph: driver " + n.DriverName() + " states an alignment that is no power of two")
	case l.MaxTransfer < 0, l.MaxZero < 0, l.MaxDiscard < 0:
		panic("graph: driver " + n.DriverName() + " states a negative limit")
	}
}

// Caps are the properties of n's driver, as cached by the node.
func (n *Node) Caps() Caps {
	if c := n.io.shown.Load(); c != nil {
		return *c
	}
	return Caps{}
}

// Caps are the properties of the driver below.
func (e *Edge) Caps() Caps { return e.node.Load().Caps() }

// Size is the size of the node below, in bytes.
func (e *Edge) Size() int64 { return e.node.Load().Size() }

// errReadOnly is blk.ErrReadOnly in the words that users are shown.
var errReadOnly = blk.Text("Block node is read-only", errors.Join(blk.ErrReadOnly, syscall.EPERM))

// mayGrow tells whether a write through e with flags f may make the node longer.
func (e *Edge) mayGrow(f blk.Flags) bool {
	return (e.root == nil || f&blk.Grow != 0) && perm.Perm(e.claim.Load())&perm.Resize != 0
}

// checkClaim panics, under -tags invariants, when e's parent writes without having claimed it.
func (e *Edge) checkClaim(f blk.Flags) {
	need := perm.Write
	if f&blk.WriteUnchanged != 0 {
		need |= perm.WriteUnchanged
	}
	if perm.Perm(e.claim.Load())&need == 0 {
		panic("graph: " + e.Parent().Describe() + " writes to its child '" + e.name + "' without permission")
	}
}

// writable is what every writer checks first: the range, and that the node takes writes.
func (e *Edge) writable(n *Node, off, size int64, f blk.Flags) error {
	return e.changeable(n, off, size, f, n.io.writer != nil)
}

// discardable is writable for discards: what gives up data need not be able to take new ones.
func (e *Edge) discardable(n *Node, off, size int64) error {
	return e.changeable(n, off, size, 0, n.io.writer != nil || n.io.discard != nil)
}

func (e *Edge) changeable(n *Node, off, size int64, f blk.Flags, can bool) error {
	if !blk.ValidRange(off, size) {
		return blk.ErrOutOfRange
	}
	if n.readOnly.Load() || !can {
		if n.io.drv == nil {
			return blk.ErrClosed
		}
		return errReadOnly
	}
	if invariantsOn {
		e.checkClaim(f)
	}
	return nil
}

// stopped is the reason why a request of several parts should not go on to the next one, or nil.
func stopped(r *blk.Req) error {
	if r.Ctx == nil || r.Ctx.Err() == nil {
		return nil
	}
	return context.Cause(r.Ctx)
}

// detectZeroes tells whether writes of zeroes are to become Zero requests, and whether these may
// deallocate.
func (n *Node) detectZeroes() (detect, unmap bool) {
	if n.io.zeroer == nil {
		return false, false
	}
	switch n.opts.Load().DetectZeroes {
	case types.BlockdevDetectZeroesOptionsOn:
		return true, false
	case types.BlockdevDetectZeroesOptionsUnmap:
		return true, true
	}
	return false, false
}
