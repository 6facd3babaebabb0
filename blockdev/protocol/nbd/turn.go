package nbd

import "qblockd/graph/blk"

// turn is whose turn it is to read replies.
type turn uint8

const (
	runs    turn = iota // run
	leads               // a request that is alone, and waits for its reply
	nobodys             // nothing is under way
)

// manyAlone is after how many requests that were alone on the connection the next ones read their
// replies themselves.
const manyAlone = 16

// lead reads the reply to s if that is all there is to wait for and nobody else does: then no
// goroutine has to wake another one for it.
func (c *conn) lead(r *blk.Req, s *slot) {
	if !c.mayLead(r, s) {
		return
	}
	whole := false
	defer func() {
		if !whole {
			c.kill(errInternal) // in a panic
		}
		c.leave()
	}()
	for c.waitsFor(s) {
		if err := c.readReply(); err != nil {
			c.kill(err)
		}
	}
	whole = true
}

// mayLead makes it the turn of s to read, if it may.
func (c *conn) mayLead(r *blk.Req, s *slot) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turn != nobodys || s.answered || c.dead != nil {
		return false
	}
	if c.open > 1 || !s.sent { // who is to send must not wait for the server
		c.turnLocked(runs)
		return false
	}
	c.turn, c.leader = leads, r.Ctx
	return true
}

// waitsFor tells whether s has no answer, and may get one.
func (c *conn) waitsFor(s *slot) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !s.answered && c.dead == nil
}

// leave ends the turn of a request.
func (c *conn) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leader = nil; c.open > 0 || c.in.Buffered() > 0 || c.dead != nil {
		c.turnLocked(runs)
	} else {
		c.restLocked()
	}
}

// restLocked makes it nobody's turn. That the connection ends meanwhile is for look to find, whose
// last call may have been a moment too early for that.
//
// +checklocks:c.mu
func (c *conn) restLocked() {
	c.turn = nobodys
	c.watchLocked()
}

// +checklocks:c.mu
func (c *conn) turnLocked(t turn) {
	c.turn = t
	c.told.Signal()
}

// mayRead waits until it is the turn of run to read. It is false if the connection has ended
// meanwhile.
func (c *conn) mayRead() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == 0 && c.alone >= manyAlone && c.in.Buffered() == 0 && c.dead == nil {
		c.restLocked()
	}
	for c.turn != runs {
		if c.turn == nobodys && c.dead != nil {
			return false
		}
		c.told.Wait()
	}
	return true
}
