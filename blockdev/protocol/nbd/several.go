package nbd

import (
	"errors"
	"log/slog"
	"net"
	"slices"

	"qblockd/blockdev/nbdwire"
)

// maxConnections is how many connections a node may have.
const maxConnections = 16

var (
	errSibling = errors.New("another connection of the node is lost")
	errOther   = errors.New("it leads to another export, or to one that takes a single connection")
)

// pickLocked is the connection with the fewest requests under way, counting the one that is to be.
// +checklocks:l.mu
func (l *link) pickLocked() *conn {
	best := l.conns[0]
	for _, c := range l.conns[1:] {
		if c.load.Load() < best.load.Load() {
			best = c
		}
	}
	best.load.Add(1)
	return best
}

// sameAge tells whether the connections of that age are still in use.
func (l *link) sameAge(age int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state == connected && l.age == age
}

// more makes further connections besides the first one of that age. What cannot be had is done
// without until the server is connected to again.
func (l *link) more(age int, first *export) {
	if !first.has(nbdwire.FlagMultiConn) {
		slog.Info("an NBD server takes one connection only", "node", l.node, "asked", l.most)
		return
	}
	for have := 1; have < l.most; have++ {
		nc, e, err := l.dial(l.ctx)
		if err == nil && !(l.fits(e) && e.has(nbdwire.FlagMultiConn)) {
			_ = nc.Close()
			err = errOther
		}
		if err != nil {
			if l.ctx.Err() == nil {
				slog.Warn("no further connection to an NBD server", "node", l.node, "connections", have, "error", err)
			}
			return
		}
		if !l.add(age, nc, e) {
			_ = nc.Close()
			return
		}
	}
}

// add takes a further connection into use, unless the first one is lost meanwhile.
func (l *link) add(age int, nc net.Conn, e *export) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != connected || l.age != age {
		return false
	}
	l.runLocked(nc, e)
	return true
}

// leaveLocked takes c out of use. false: it was not in use any more, or it is one of several and
// has never answered, so that nothing relies on it and the others go on. Else nothing is in use:
// what was acknowledged on any of them, and not flushed, could be with another server than the
// next. answered: one of them has answered something.
//
// +checklocks:l.mu
func (l *link) leaveLocked(c *conn, err error) (last, answered bool) {
	i := slices.Index(l.conns, c)
	if i < 0 {
		return false, false
	}
	l.conns = slices.Delete(l.conns, i, i+1)
	answered = c.answered.Load()
	var breach protocolError
	if i > 0 && !answered && !errors.As(err, &breach) {
		slog.Warn("a further connection to an NBD server is lost", "node", l.node,
			"connections", len(l.conns), "error", err)
		return false, false
	}
	for _, c := range l.conns {
		answered = answered || c.answered.Load()
		c.kill(errSibling)
	}
	clear(l.conns)
	l.conns = l.conns[:0]
	return true, answered
}
