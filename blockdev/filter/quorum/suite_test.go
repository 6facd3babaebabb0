package quorum

import (
	"bytes"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/blkdebug"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/schema/types"
)

var fifo = types.QuorumReadPatternFifo

// The suite on copies that are all well; after each test they are equal. Those that write the same
// places at the same time are in it.
func TestSuite(t *testing.T) {
	for name, o := range map[string]types.BlockdevOptionsQuorum{
		"1 copy": {VoteThreshold: 1}, "2 copies": {VoteThreshold: 2, Blkverify: new(true)},
		"5 copies": {VoteThreshold: 3, RewriteCorrupted: new(true)}, "3 copies, fifo": {VoteThreshold: 2, ReadPattern: &fifo},
	} {
		t.Run(name, func(t *testing.T) {
			var c *copies
			n := int(name[0] - '0')
			drivertest.Run(t, drivertest.Config{
				Fixed: true,
				Layers: []drivertest.Layer{
					{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}},
					{Name: "blkdebug", Def: blkdebug.Def, Options: &types.BlockdevOptionsBlkdebug{}},
				},
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					c = build(t, g, n, size, ro, o)
					return c.node
				},
				Check: func(t *testing.T, _ *graph.Node) { c.equal(t) },
			})
		})
	}
}

// equal fails the test where copies differ.
func (c *copies) equal(t *testing.T) {
	t.Helper()
	for i, f := range c.files[1:] {
		if !bytes.Equal(f.Bytes(), c.files[0].Bytes()) {
			t.Errorf("copy %d differs from copy 0", i+1)
		}
	}
}
