package drivertest

import (
	"testing"

	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func layers() []Layer {
	window := &types.BlockdevOptionsRaw{Offset: new(int64)}
	*window.Offset = 512
	return []Layer{
		{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}},
		{Name: "window", Def: raw.Def, Options: window},
	}
}

// Storage of all kinds of narrowness behind the same front.
func TestSuiteMemFile(t *testing.T) {
	for _, c := range []struct {
		name string
		o    MemOptions
	}{
		{"easy", MemOptions{WriteFlags: blk.FUA, ZeroFlags: blk.FUA | blk.MayUnmap | blk.NoFallback}},
		{"blocks", MemOptions{Limits: blk.Limits{RequestAlign: 512}}},
		{"direct", MemOptions{Limits: blk.Limits{RequestAlign: 512, MemAlign: 512, MaxTransfer: 32 << 10},
			ZeroFlags: blk.MayUnmap}},
		{"awkward", MemOptions{Limits: blk.Limits{RequestAlign: 512, MemAlign: 4096, MaxTransfer: 3 << 9,
			ZeroAlign: 4096, MaxZero: 16384, DiscardAlign: 65536, MaxDiscard: 131072}, WriteFlags: blk.FUA}},
		{"nozero", MemOptions{Limits: blk.Limits{RequestAlign: 512, MaxTransfer: 8192}, NoZero: true, NoDiscard: true}},
		{"slow", MemOptions{Slow: true, Fixed: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			Run(t, Config{
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					return MustBuild(t, g, Spec{
						Options: graph.Options{Name: "mem", Kind: graph.Protocol, ReadOnly: ro},
						Open:    Opened(NewMemFileOptions(size, c.o))})
				},
				Layers: layers(),
				Fixed:  c.o.Fixed,
			})
		})
	}
}

func TestSuiteHostFile(t *testing.T) {
	Run(t, Config{
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			h := NewHostFile(t, size)
			t.Cleanup(func() {
				if n := h.Leases.Load(); n != 0 {
					t.Errorf("%d leases left", n)
				}
			})
			return MustBuild(t, g, Spec{
				Options: graph.Options{Name: "host", Kind: graph.Protocol, ReadOnly: ro}, Open: Opened(h),
			})
		},
		Layers: layers(),
	})
}

func TestSuiteFault(t *testing.T) {
	Run(t, Config{
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			return MustBuild(t, g, Spec{Options: graph.Options{Name: "mem", Kind: graph.Protocol, ReadOnly: ro},
				Open: Opened(NewFault(NewCrashFile(size)))})
		},
	})
}
