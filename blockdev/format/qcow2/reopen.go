package qcow2

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// reopen: all runtime options may change.
func reopen(open graph.Driver, u *types.BlockdevOptionsQcow2, g *graph.Options) (graph.Participant, error) {
	return open.(*Driver).image.reconfigure(u, g.Discard)
}

// reconfiguration changes the options of an open image in a transaction, while no requests run.
type reconfiguration struct {
	s       *image
	options *types.BlockdevOptionsQcow2
	unmap   bool
	set     settings
	// inactive is what overlap-check will look at; nil without all.
	inactive map[int64]struct{}
}

// reconfigure checks the options.
func (s *image) reconfigure(options *types.BlockdevOptionsQcow2, unmap bool) (*reconfiguration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set, err := resolve(options, s.hdr, unmap)
	if err != nil {
		return nil, err
	}
	return &reconfiguration{s: s, options: options, unmap: unmap, set: set}, nil
}

// Prepare implements graph.Participant. It leaves nothing in the caches that is not in the file,
// and no dirty bit, which may be about to lose its meaning.
func (c *reconfiguration) Prepare(ctx context.Context) (err error) {
	s, r := c.s, &blk.Req{Ctx: ctx}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead.Load() {
		return nil
	}
	if c.set.overlap&olInactiveL2 != 0 {
		if c.inactive, err = s.findInactive(r); err != nil {
			return err
		}
	}
	if s.readOnly {
		return nil
	}
	if err := s.flush(r); err != nil {
		return err
	}
	return s.markClean(r)
}

// Commit implements graph.Participant.
func (c *reconfiguration) Commit() {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopClean()
	old := s.set
	s.options, s.unmap, s.set = *c.options, c.unmap, c.set
	if s.dead.Load() {
		return
	}
	s.inactive = c.inactive
	if c.set.slice != old.slice || c.set.l2Tables != old.l2Tables || c.set.rbTables != old.rbTables {
		if s.l2.ndirty+s.rb.ndirty > 0 {
			panic("qcow2: caches are dirty while nothing runs")
		}
		epochs := [2]uint64{s.l2.epoch, s.rb.epoch}
		s.makeCaches()
		s.l2.epoch, s.rb.epoch = epochs[0]+1, epochs[1]+1
	}
	s.startCleaning()
}

// Abort implements graph.Participant.
func (*reconfiguration) Abort() {}
