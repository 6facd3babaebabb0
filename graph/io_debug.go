package graph

import "qblockd/graph/blk"

// DebugEvent tells the node below, if it wants to know, of a step that its parent is about to take.
func (e *Edge) DebugEvent(r *blk.Req, ev blk.DebugEvent) {
	if d := e.node.Load().io.drv.debug; d != nil {
		d.DebugEvent(r, ev)
	}
}
