package export

import (
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// told tells whether the export was told of another size since it was asked before.
func told(x *Export) bool {
	select {
	case <-x.Resized():
		return true
	default:
		return false
	}
}

// An export is told when the node that it shows, or one whose size that shows, gets another size,
// and when it shows another node.
func TestResized(t *testing.T) {
	b := newBench(t)
	if err := b.export("e", "top", "", false); err != nil {
		t.Fatal(err)
	}
	x := b.x.servedLocked("e") // +checklocksignore: nobody else is here
	told(x)
	root, err := b.g.AddRoot(t.Context(), graph.RootSpec{
		EdgeName: "root", Claim: perm.Claim{Need: perm.Resize, Share: perm.All}}, b.g.Node("top"))
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Resize(t.Context(), 2<<20, true, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	if !told(x) || x.Size() != 2<<20 {
		t.Errorf("after a resize: told too little, or size %d", x.Size())
	}
	if told(x) {
		t.Error("told again")
	}
	drivertest.AddNode(t, b.g, "large", drivertest.NewMemFile(5<<20))
	err = b.g.Do(t.Context(), func(tx *graph.Tx) error { return tx.ReplaceNode(b.g.Node("top"), b.g.Node("large")) })
	if err != nil || !told(x) || x.Size() != 5<<20 {
		t.Errorf("after the node was replaced: %v, or told too little, or size %d", err, x.Size())
	}
}
