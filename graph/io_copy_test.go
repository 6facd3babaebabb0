package graph

import (
	"bytes"
	"context"
	"testing"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// mapDriver counts how often it is asked where its data lie.
type mapDriver struct {
	memDriver
	asked int
}

func (d *mapDriver) Map(*blk.Req, int64, int64, *blk.Mapping) error {
	d.asked++
	return blk.ErrNotSupported
}

// TestCopyThroughMemory: the kernel is asked by Copy, not by CopyThroughMemory; both copy.
func TestCopyThroughMemory(t *testing.T) {
	for name, c := range map[string]struct {
		copy  func(r *blk.Req, src, dst *Edge, off, n int64, f blk.Flags) error
		asked int
	}{"Copy": {Copy, 1}, "CopyThroughMemory": {CopyThroughMemory, 0}} {
		g := New(nullSink{})
		src := &mapDriver{memDriver: memDriver{data: bytes.Repeat([]byte{7}, 4096)}}
		dst := &memDriver{data: make([]byte, 4096)}
		from := add(t, g, Options{Name: "src", Kind: Protocol}, func(*Node) Driver { return src })
		to := add(t, g, Options{Name: "dst", Kind: Protocol}, memOf(dst))
		var roots []*Root
		tx := g.Begin(context.Background())
		for _, n := range []*Node{from, to} {
			claim := perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All}
			r, err := tx.AttachRoot(RootSpec{EdgeName: "root", Claim: claim}, n)
			if err != nil {
				t.Fatal(err)
			}
			roots = append(roots, r)
		}
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		r, err := roots[0].Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		err = c.copy(r, roots[0].Edge(), roots[1].Edge(), 512, 1024, 0)
		roots[0].End(r)
		if err != nil || src.asked != c.asked || !bytes.Equal(dst.data[512:1536], src.data[:1024]) ||
			dst.data[511]|dst.data[1536] != 0 {
			t.Errorf("%s: %v; the kernel was asked %d times, want %d", name, err, src.asked, c.asked)
		}
		detachAll(t, g)
	}
}
