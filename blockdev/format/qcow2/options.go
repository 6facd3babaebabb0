package qcow2

import (
	"fmt"
	"math"
	"math/bits"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/schema/types"
)

// settings are options with all defaults resolved for one image.
type settings struct {
	lazy          bool
	discard       [5]bool // by discardKind
	noUnref       bool
	overlap       overlap
	slice         int64 // bytes of an L2 slice
	l2Tables      int
	rbTables      int
	cleanInterval int64 // seconds, 0: never
}

// Defaults of QEMU on Linux.
const (
	defaultL2CacheMax    = 32 << 20
	defaultCleanInterval = 600
	minL2Tables          = 2
	minRefcountTables    = 4
	// floorBytes is what each cache may take in any case: with less, evictions would cost more than
	// the memory is worth.
	floorBytes = 256 << 10
)

func pick[T any](p *T, def T) T {
	if p != nil {
		return *p
	}
	return def
}

// resolve checks the options against the image and fills in defaults. unmap is discard=unmap.
func resolve(o *types.BlockdevOptionsQcow2, h *layout.Header, unmap bool) (settings, error) {
	var s settings
	for _, x := range []struct {
		name string
		v    *int64
	}{
		{"cache-size", o.CacheSize}, {"l2-cache-size", o.L2CacheSize},
		{"l2-cache-entry-size", o.L2CacheEntrySize}, {"refcount-cache-size", o.RefcountCacheSize},
	} {
		if x.v != nil && *x.v < 0 {
			return s, fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64", x.name)
		}
	}
	l2, rb, err := cacheSizes(o, h, &s)
	if err != nil {
		return s, err
	}
	n := max(l2/uint64(s.slice), minL2Tables)
	if n > math.MaxInt32 {
		return s, fmt.Errorf("L2 cache size too big")
	}
	s.l2Tables = max(int(n), int(floorBytes/s.slice))
	cs := h.Geometry().ClusterSize()
	n = max(rb/uint64(cs), minRefcountTables)
	if n > math.MaxInt32 {
		return s, fmt.Errorf("Refcount cache size too big")
	}
	s.rbTables = max(int(n), int(floorBytes/cs))
	s.cleanInterval = pick(o.CacheCleanInterval, defaultCleanInterval)
	if uint64(s.cleanInterval) > math.MaxUint32 {
		return s, fmt.Errorf("Cache clean interval too big")
	}
	s.lazy = pick(o.LazyRefcounts, h.CompatibleFeatures&layout.CompatLazyRefcounts != 0)
	if s.lazy && h.Version < 3 {
		return s, fmt.Errorf("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
	}
	if s.overlap, err = overlapChecks(o.OverlapCheck); err != nil {
		return s, err
	}
	s.discard[discardAlways] = true
	s.discard[discardRequest] = pick(o.PassDiscardRequest, unmap)
	s.discard[discardSnapshot] = pick(o.PassDiscardSnapshot, true)
	s.discard[discardOther] = pick(o.PassDiscardOther, false)
	s.noUnref = pick(o.DiscardNoUnref, false)
	if s.noUnref && h.Version < 3 {
		return s, fmt.Errorf("discard-no-unref is only supported since qcow2 version 3")
	}
	return s, checkEncrypt(o, h)
}

// cacheSizes shares the memory between the two caches as QEMU does.
func cacheSizes(o *types.BlockdevOptionsQcow2, h *layout.Header, s *settings) (l2, rb uint64, err error) {
	g := h.Geometry()
	cs := uint64(g.ClusterSize())
	entries := (h.Size + cs - 1) / cs
	maxL2 := (entries<<g.EntryBits() + cs - 1) &^ (cs - 1)
	minRB := minRefcountTables * cs
	l2Max := uint64(pick(o.L2CacheSize, defaultL2CacheMax))
	rb = uint64(pick(o.RefcountCacheSize, 0))
	l2 = min(maxL2, l2Max)
	if o.CacheSize != nil {
		all := uint64(*o.CacheSize)
		switch {
		case o.L2CacheSize != nil && o.RefcountCacheSize != nil:
			return 0, 0, fmt.Errorf("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
		case o.L2CacheSize != nil && l2Max > all:
			return 0, 0, fmt.Errorf("l2-cache-size may not exceed cache-size")
		case rb > all:
			return 0, 0, fmt.Errorf("refcount-cache-size may not exceed cache-size")
		}
		switch {
		case o.L2CacheSize != nil:
			rb = all - l2
		case o.RefcountCacheSize != nil:
			l2 = all - rb
		case all >= maxL2+minRB:
			l2, rb = maxL2, all-maxL2
		default:
			rb = min(all, minRB)
			l2 = all - rb
		}
	}
	def := cs
	if l2 < maxL2 {
		def = min(cs, 4096)
	}
	slice := uint64(pick(o.L2CacheEntrySize, int64(def)))
	if slice < 1<<layout.MinClusterBits || slice > cs || bits.OnesCount64(slice) != 1 {
		return 0, 0, fmt.Errorf("L2 cache entry size must be a power of two between %d and the cluster size (%d)",
			1<<layout.MinClusterBits, cs)
	}
	s.slice = int64(slice)
	return l2, rb, nil
}

var overlapModes = map[types.Qcow2OverlapCheckMode]overlap{
	types.Qcow2OverlapCheckModeNone: 0, types.Qcow2OverlapCheckModeConstant: olConstant,
	types.Qcow2OverlapCheckModeCached: olCached, types.Qcow2OverlapCheckModeAll: olAll,
}

func overlapChecks(o *types.Qcow2OverlapChecks) (overlap, error) {
	mode, f := types.Qcow2OverlapCheckModeCached, types.Qcow2OverlapCheckFlags{}
	switch {
	case o == nil:
	case o.Mode != nil:
		mode = *o.Mode
	case o.Flags != nil:
		f, mode = *o.Flags, pick(o.Flags.Template, mode)
	}
	c, ok := overlapModes[mode]
	if !ok {
		return 0, fmt.Errorf("Unsupported value '%s' for qcow2 option 'overlap-check'. "+
			"Allowed are any of the following: none, constant, cached, all", mode)
	}
	for i, on := range [...]*bool{
		f.MainHeader, f.ActiveL1, f.ActiveL2, f.RefcountTable, f.RefcountBlock,
		f.SnapshotTable, f.InactiveL1, f.InactiveL2, f.BitmapDirectory,
	} {
		if on == nil {
			continue
		}
		c &^= 1 << i
		if *on {
			c |= 1 << i
		}
	}
	return c, nil
}
