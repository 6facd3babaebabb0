package nbd

import (
	"context"
	"math"
	"math/bits"
	"net"
	"syscall"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/nbdwire"
	"qblockd/events/clock"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// disk is an export of a server: the driver.
type disk struct {
	e     *export // as it was when the node was opened, which is what it has to be later on
	depth bool    // the block status is that of the context qemu:allocation-depth
	size  int64   // of e, rounded up to sectors
	srv   *server
	link  link
}

var (
	_ graph.Writer        = (*disk)(nil)
	_ graph.Zeroer        = (*disk)(nil)
	_ graph.Discarder     = (*disk)(nil)
	_ graph.Flusher       = (*disk)(nil)
	_ graph.BlockStatuser = (*disk)(nil)
	_ graph.Resizer       = (*disk)(nil)
	_ graph.Drainer       = (*disk)(nil)
	_ graph.Inactivator   = (*disk)(nil)
)

// contextOf is the metadata context whose extents are the block status.
func contextOf(o *types.BlockdevOptionsNbd) string {
	if o.XDirtyBitmap != nil {
		return *o.XDirtyBitmap
	}
	return nbdwire.ContextAllocation
}

// open connects to the server.
func open(x *driver.Opening, o *types.BlockdevOptionsNbd) (graph.Driver, error) {
	s, err := newServer(x, o)
	if err != nil {
		return nil, err
	}
	nc, e, err := s.connectFirst(x.Ctx, o)
	if err == nil {
		if err = usable(x, o, e); err != nil {
			_ = nc.Close()
		}
	}
	if err != nil {
		s.close()
		return nil, err
	}
	d := newDisk(s, e, x.Node.Name(), seconds(o.ReconnectDelay), clock.Real)
	if o.XQblockdConnections != nil {
		d.link.most = int(*o.XQblockdConnections)
	}
	d.link.start(nc, e)
	return d, nil
}

// newDisk makes the driver of an export; link.start must follow.
func newDisk(s *server, e *export, node string, delay time.Duration, clk clock.Clock) *disk {
	d := &disk{e: e, srv: s, depth: s.context == nbdwire.ContextDepth}
	d.size = blk.AlignUp(e.size, blk.SectorSize)
	d.link.node, d.link.dial, d.link.clock, d.link.delay = node, s.connect, clk, delay
	d.link.fits = d.fits
	return d
}

func seconds(n *uint32) time.Duration {
	if n == nil {
		return 0
	}
	return time.Duration(*n) * time.Second
}

// connectFirst connects for the first time, again and again for as long as open-timeout says.
func (s *server) connectFirst(ctx context.Context, o *types.BlockdevOptionsNbd) (net.Conn, *export, error) {
	limit := seconds(o.OpenTimeout)
	if limit == 0 {
		return s.connect(ctx)
	}
	late := blk.Text("Connection attempt cancelled by timeout", syscall.ETIMEDOUT)
	limited, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		nc, e, err := s.connect(limited)
		switch {
		case err == nil:
			return nc, e, nil
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case limited.Err() != nil:
			return nil, nil, err
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-limited.Done():
			t.Stop()
			if ctx.Err() != nil {
				return nil, nil, context.Cause(ctx)
			}
			return nil, nil, err // of the last attempt
		}
	}
}

// usable checks the export against what the node is to be. Where it may, a node that cannot be
// written to becomes read-only.
func usable(x *driver.Opening, o *types.BlockdevOptionsNbd, e *export) error {
	if o.XDirtyBitmap != nil && !e.status {
		return blk.Text("Could not open image: Invalid argument", syscall.EINVAL)
	}
	g := x.Node.Options()
	if !e.has(nbdwire.FlagReadOnly) || g.ReadOnly {
		return nil
	}
	if !g.AutoReadOnly {
		return blk.Text("Could not open image: Permission denied", syscall.EACCES)
	}
	return x.Node.Graph().Do(x.Ctx, func(tx *graph.Tx) error { return tx.SetReadOnly(x.Node, true) })
}

// fits tells whether a server that has come back can do what the nodes above rely on.
func (d *disk) fits(e *export) bool {
	const needed = nbdwire.FlagFlush | nbdwire.FlagFUA | nbdwire.FlagTrim | nbdwire.FlagWriteZeroes |
		nbdwire.FlagFastZero
	switch {
	case e.size != d.e.size, d.e.flags&^e.flags&needed != 0, d.e.status && !e.status:
		return false
	case d.e.extended && !e.extended: // requests may be longer than it takes
		return false
	case e.has(nbdwire.FlagReadOnly) && !d.e.has(nbdwire.FlagReadOnly):
		return false
	}
	was, is := d.e.limits(), e.limits()
	return is.RequestAlign <= was.RequestAlign && is.MaxTransfer >= was.MaxTransfer
}

// limits are those of requests to the server.
func (e *export) limits() blk.Limits {
	align := int64(e.minBlock)
	if align == 0 {
		// An old server is spared what it may never have seen. One with block status may tell of
		// parts of sectors.
		if align = blk.SectorSize; e.size%blk.SectorSize != 0 || e.status {
			align = 1
		}
	}
	most := int64(nbdwire.MaxPayload)
	if e.maxBlock > 0 {
		most = max(min(most, blk.AlignDown(int64(e.maxBlock), align)), align)
	}
	l := blk.Limits{RequestAlign: align, MaxTransfer: most}
	if !e.extended { // else what has no payload has no limit
		l.MaxZero, l.MaxDiscard = most, blk.AlignDown(math.MaxInt32, align)
	}
	if int64(e.optBlock) > align && bits.OnesCount32(e.optBlock) == 1 && int64(e.optBlock) <= most {
		l.OptTransfer = int64(e.optBlock)
	}
	return l
}

// Caps implements graph.Driver.
func (d *disk) Caps() graph.Caps {
	c := graph.Caps{Limits: d.e.limits(), ZeroFlags: blk.MayUnmap, Remote: true}
	if d.e.has(nbdwire.FlagFUA) {
		c.WriteFlags |= blk.FUA
		c.ZeroFlags |= blk.FUA
	}
	if d.e.has(nbdwire.FlagFastZero) {
		c.ZeroFlags |= blk.NoFallback
	}
	return c
}

// Size implements graph.Driver.
func (d *disk) Size() int64 { return d.size }

// Close implements graph.Driver.
func (d *disk) Close() error {
	d.link.close()
	d.srv.close()
	return nil
}

// DrainBegin implements graph.Drainer: no request waits for a server that is not there, and none
// for long for one that is silent.
func (d *disk) DrainBegin() { d.link.hold() }

// Quiet implements graph.Drainer.
func (d *disk) Quiet() bool { return d.link.quiet() }

// DrainEnd implements graph.Drainer.
func (d *disk) DrainEnd() { d.link.release() }

// Inactivate implements graph.Inactivator: the node is about to be closed, and what flushes it must
// not wait for a server that does not answer.
func (d *disk) Inactivate(*blk.Req) error {
	d.link.hold()
	return nil
}

// reopen refuses to make a node writable whose export is not. No option can change.
func reopen(drv graph.Driver, _ *types.BlockdevOptionsNbd, g *graph.Options) (graph.Participant, error) {
	d, ok := drv.(*disk)
	if ok && !g.ReadOnly && d.e.has(nbdwire.FlagReadOnly) {
		return nil, blk.Text("Can't reopen read-only NBD mount as read/write", syscall.EACCES)
	}
	return nil, nil
}
