package graph

import "qblockd/graph/blk"

// DebugEvent tells the node below, if it wants to know, of a step that its parent is about to take.
func (e *Edge) DebugEvent(r *blk.Req, ev blk.DebugEvent) {
	if d := e.node.Load().io.debug; d != nil {
		d.DebugEvent(r, ev)
	}
}

// step tells the driver itself, if it wants to know.
func (s *ioState) step(r *blk.Req, ev blk.DebugEvent) {
	if s.debug != nil {
		s.debug.DebugEvent(r, ev)
	}
}
