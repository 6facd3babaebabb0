package graph

import (
	"errors"
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

// IO is the I/O path of a node; its fields are where requests find everything.
type IO struct {
	n   *Node
	drv access

	track   tracker
	flush   flushState
	copying blk.Budget // of what copy-on-read has in memory

	threshold  atomic.Uint64 // see threshold.go
	wrHighest  atomic.Int64  // end of the farthest write
	statusData dataCache     // see io_status.go
}

// IO is what can be asked of, and done to, the node's I/O path.
func (n *Node) IO() *IO { return &n.io }

// opened is called once, by SetDriver, on the still hidden node.
func (s *IO) opened() {
	s.copying.Limit = copyingMax
	s.drv.opened(s.n)
	if s.drv.caps.Ordered {
		s.track.reads.Add(1) // for good
	}
}

// refreshed asks the driver's properties again, after a reopen, while the node is drained.
func (s *IO) refreshed() {
	s.drv.refreshed()
	s.statusData.drop()
}

// Caps are the properties of n's driver, as cached by the node.
func (n *Node) Caps() Caps {
	if c := n.io.drv.shown.Load(); c != nil {
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

// errInactive is for those who would change what is left to others.
var errInactive = blk.Text("Operation not permitted", syscall.EPERM)

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
func (e *Edge) writable(s *IO, off, size int64, f blk.Flags) error {
	return e.changeable(s, off, size, f, s.drv.writer != nil)
}

// discardable is writable for discards: what gives up data need not be able to take new ones.
func (e *Edge) discardable(s *IO, off, size int64) error {
	return e.changeable(s, off, size, 0, s.drv.writer != nil || s.drv.discard != nil)
}

func (e *Edge) changeable(s *IO, off, size int64, f blk.Flags, can bool) error {
	if !blk.ValidRange(off, size) {
		return blk.ErrOutOfRange
	}
	if s.n.readOnly.Load() || s.n.inactive.Load() || !can {
		switch {
		case s.drv.Driver == nil:
			return blk.ErrClosed
		case s.n.inactive.Load():
			return errInactive
		}
		return errReadOnly
	}
	if invariantsOn {
		e.checkClaim(f)
	}
	return nil
}

// detectZeroes tells whether writes of zeroes are to become Zero requests, and whether these may
// deallocate.
func (s *IO) detectZeroes() (detect, unmap bool) {
	if s.drv.zeroer == nil {
		return false, false
	}
	switch s.n.opts.Load().DetectZeroes {
	case types.BlockdevDetectZeroesOptionsOn:
		return true, false
	case types.BlockdevDetectZeroesOptionsUnmap:
		return true, true
	}
	return false, false
}
