package qcow2

import (
	"bytes"
	"context"
	"testing"

	"qblockd/graph/blk"
)

// TestGrowEndsWithItsClient: a disk that needs an L1 table of 16 MiB grows as a whole or not at
// all, and however often its client goes meanwhile, nothing is lost.
func TestGrowEndsWithItsClient(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(4096))})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 4096)), 8192, 0); err != nil {
		t.Fatal(err)
	}
	const size = 1 << 42
	gaveUp := 0
	for i := 0; ; i++ {
		ctx := &looks{Context: context.Background(), most: i}
		err := s.Resize(&blk.Req{Ctx: ctx}, size, "")
		if err == nil {
			break
		}
		if gaveUp++; s.size.Load() != 1<<20 {
			t.Fatalf("%d looks: %v, but the size is %d", i, err, s.size.Load())
		}
		sound(t, s, false)
	}
	if gaveUp < 16 {
		t.Errorf("given up %d times", gaveUp)
	}
	b := make([]byte, 4096)
	if err := s.ReadAt(req(), blk.Buf(b), 8192, 0); err != nil || s.size.Load() != size || b[0] != 1 || b[4095] != 1 {
		t.Errorf("size %d, %v", s.size.Load(), err)
	}
	mustClose(t, s)
	s = mustOpen(t, mem{f}, config{})
	sound(t, s, false)
	if err := s.ReadAt(req(), blk.Buf(b), 8192, 0); err != nil || b[0] != 1 || b[4095] != 1 {
		t.Error(err)
	}
	mustClose(t, s)
}
