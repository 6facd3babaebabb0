package quorum

import (
	"sync/atomic"

	"qblockd/events/panics"
)

// idleMax is how many goroutines of a quorum wait for something to do.
const idleMax = 16

// crew are the goroutines in which copies are waited for. A few stay when there is nothing to do.
type crew struct {
	work chan *share // who has nothing to do waits here
	over chan struct{}
	all  panics.Group
	idle atomic.Int32
}

func (c *crew) init() { c.work, c.over = make(chan *share), make(chan struct{}) }

// start runs s in one of them.
func (c *crew) start(s *share) {
	select {
	case c.work <- s:
	default:
		c.all.Go("a copy of a quorum", func() { c.serve(s) })
	}
}

func (c *crew) serve(s *share) {
	for {
		s.run()
		if c.idle.Add(1) > idleMax {
			c.idle.Add(-1)
			return
		}
		select {
		case s = <-c.work:
			c.idle.Add(-1)
		case <-c.over:
			return
		}
	}
}

// dismiss ends them. Nothing is under way.
func (c *crew) dismiss() {
	close(c.over)
	c.all.Wait()
}
