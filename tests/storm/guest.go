package storm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"qblockd/tests/daemon"
)

const (
	block    = 4096
	granule  = 64 << 10
	diskSize = 4 << 20
)

// guest writes to every other part of an exported disk, and knows what is there.
type guest struct {
	socket, export string
	part, parts    int64
	r              *rand.Rand
	limit          time.Duration
	n              *daemon.NBD
	last           uint64
	may            map[int64][]uint64 // block -> what it may hold; nothing: zeroes
	touched        map[int64]bool     // granules that were, or may have been, written
	certain        map[int64]bool     // granules that were written
}

func (w *world) newGuest(export string, part, parts int64) *guest {
	return &guest{
		socket: w.d.NBDSocket(), export: export, part: part, parts: parts, limit: w.c.limit,
		r:   rand.New(rand.NewPCG(w.c.seed, uint64(part))),
		may: map[int64][]uint64{}, touched: map[int64]bool{}, certain: map[int64]bool{},
	}
}

// run goes on until stop is closed.
func (g *guest) run(stop <-chan struct{}) error {
	defer func() {
		if g.n != nil {
			g.n.Drop()
		}
		g.n = nil
	}()
	return until(stop, g.step)
}

func (g *guest) connect() (err error) {
	if g.n == nil {
		g.n, err = daemon.DialNBDBy(g.socket, g.export, time.Now().Add(g.limit))
	}
	if err == nil {
		g.n.SetDeadline(time.Now().Add(g.limit))
	}
	return err
}

// step is one request.
func (g *guest) step() error {
	if err := g.connect(); err != nil {
		return g.lost(err)
	}
	at := g.r.Int64N(diskSize/block/g.parts)*g.parts + g.part
	off, before := at*block, g.holds(at)
	var err error
	var new []uint64
	discard := false // which the node may ignore
	switch k := g.r.IntN(20); {
	case k < 8:
		g.last += uint64(g.parts)
		v := g.last<<8 | uint64(g.part) + 1
		new = []uint64{v}
		err = g.n.WriteAt(content(v), off)
	case k < 10:
		new = []uint64{0}
		err = g.n.Zero(off, block)
	case k < 12:
		new, discard = append(slices.Clone(before), 0), true
		err = g.n.Trim(off, block)
	case k < 13:
		return g.lost(g.n.Flush())
	default:
		return g.look(at)
	}
	g.touched[off/granule] = true
	g.may[at] = new
	if err != nil {
		g.may[at] = append(slices.Clone(before), new...)
	} else if !discard {
		g.certain[off/granule] = true
	}
	return g.lost(err)
}

// holds are what a block may hold.
func (g *guest) holds(at int64) []uint64 {
	if may := g.may[at]; may != nil {
		return may
	}
	return []uint64{0}
}

func content(v uint64) []byte { return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, v), block/8) }

// lost is what came of a request: nothing that a guest does here may fail.
func (g *guest) lost(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("guest of %s: %w", g.export, err)
}

// look reads a block.
func (g *guest) look(at int64) error {
	p := make([]byte, block)
	if err := g.n.ReadAt(p, at*block); err != nil {
		return g.lost(err)
	}
	v, may := binary.LittleEndian.Uint64(p), g.holds(at)
	if !bytes.Equal(p, content(v)) || !slices.Contains(may, v) {
		return fmt.Errorf("guest of %s: block %d reads %#x..., and should be one of %#x", g.export, at, p[:16], may)
	}
	return nil
}

// lookAll reads everything that it has written.
func (g *guest) lookAll() error {
	if err := g.connect(); err != nil {
		return err
	}
	for at := range g.may {
		if err := g.look(at); err != nil {
			return err
		}
	}
	return nil
}
