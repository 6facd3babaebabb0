package meta

import (
	"fmt"
	"math/rand/v2"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// shape is how an image is laid out.
type shape struct {
	cs    int
	v2    bool
	bits  int64
	comp  types.Qcow2CompressionType
	lazy  bool
	align int // sizes are multiples of it
}

func (s shape) String() string {
	v := "v3"
	if s.v2 {
		v = "v2"
	}
	return fmt.Sprintf("%s, clusters of %d, %d bit refcounts, %s, lazy %v", v, s.cs, s.bits, s.comp, s.lazy)
}

func randomShape(r *rand.Rand) shape {
	s := shape{
		cs: trial.Pick(r, 512, 512, 1024, 2048, 4096, 4096, 16384, 65536, 65536, 65536, 1<<20, 2<<20),
		v2: r.IntN(4) == 0, bits: 16, comp: types.Qcow2CompressionTypeZlib, align: 512,
	}
	if !s.v2 {
		s.bits = trial.Pick[int64](r, 1, 2, 4, 8, 16, 16, 32, 64)
		s.lazy = r.IntN(4) == 0
		if r.IntN(3) == 0 {
			s.comp = types.Qcow2CompressionTypeZstd
		}
	}
	return s
}

// size is that of a new image.
func (s shape) size(r *rand.Rand) int {
	clusters := 300
	switch {
	case s.cs >= 1<<20:
		clusters = 2
	case s.cs >= 65536:
		clusters = 12
	case s.cs >= 4096:
		clusters = 100
	}
	n := s.cs*(1+r.IntN(clusters)) + 512*r.IntN(s.cs/512)
	n = min(max(n, 8192), 4<<20)
	return n / s.align * s.align
}

// memOptions are the peculiarities of the file below.
func memOptions(r *rand.Rand, align int) *drivertest.MemOptions {
	o := &drivertest.MemOptions{}
	if r.IntN(2) == 0 {
		o.WriteFlags = blk.FUA | blk.WriteUnchanged
		o.ZeroFlags = blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback
	}
	switch r.IntN(6) {
	case 0:
		o.NoZero, o.ZeroFlags = true, 0
	case 1:
		o.NoDiscard = true
	case 2:
		o.Slow = true
	case 3:
		o.Limits.RequestAlign = int64(align)
	case 4:
		o.Limits.MaxTransfer, o.Limits.MaxZero = 32768, 65536
	}
	return o
}

// create makes an image, on top of another one if there is one.
func (o *op) create(*image) {
	m := &image{slot: o.Slot, closed: true, format: types.BlockdevDriverQcow2, shape: randomShape(o.r)}
	if k := o.r.IntN(10); k == 0 {
		m.format = types.BlockdevDriverFile
	} else if k == 1 {
		m.format = types.BlockdevDriverRaw
	}
	align := 512
	if m.format != types.BlockdevDriverQcow2 {
		align = trial.Pick(o.r, 512, 4096)
		m.shape = shape{cs: 512, align: align}
	}
	size := m.shape.size(o.r)
	m.data = make([]byte, size)
	if m.format != types.BlockdevDriverQcow2 {
		o.images[m.slot] = m
		o.did("create %s: %s of %d bytes", m.name(), m.format, size)
		o.makeFile(m, int64(size), align)
		return
	}
	if b := o.images[o.r.IntN(slots)]; b != nil && o.r.IntN(4) != 0 && o.steady(b) {
		o.joined(b)
		m.backing = b
		if o.r.IntN(2) == 0 {
			m.data = make([]byte, len(b.data))
		}
		copy(m.data, b.data)
	}
	o.createQcow2(m)
}

func (o *op) createQcow2(m *image) {
	c := types.BlockdevCreateOptionsQcow2{
		Size: uint64(len(m.data)), ClusterSize: rig.Ptr(uint64(m.shape.cs)), LazyRefcounts: &m.shape.lazy,
	}
	if m.shape.v2 {
		c.Version = rig.Ptr(types.BlockdevQcow2VersionV2)
	} else {
		c.RefcountBits, c.CompressionType = &m.shape.bits, &m.shape.comp
	}
	under := ""
	if b := m.backing; b != nil {
		c.BackingFile, c.BackingFmt = rig.Ptr(o.x.Path(b.file())), &b.format
		under = " on " + b.name()
	} else if o.r.IntN(5) == 0 {
		c.Preallocation = rig.Ptr(types.PreallocModeMetadata)
	}
	o.did("create %s: qcow2 of %d bytes%s: %v", m.name(), len(m.data), under, m.shape)
	align := 512
	if m.shape.cs >= 4096 {
		align = trial.Pick(o.r, 512, 4096)
	}
	o.makeFile(m, 0, align)
	o.images[m.slot] = m
	trial.Must(o.x.CreateQcow2(o.ctx, m.file(), c))
}
