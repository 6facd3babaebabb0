package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// TestRepair damages all refcounts of dirty images; opening them for writing puts them right.
func TestRepair(t *testing.T) {
	_, missing := exec.LookPath("qemu-img")
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		cs := []uint64{512, 1024, 4096}[seed%3]
		bits := int64(1) << (seed % 7)
		f := mustCreate(t, CreateOptions{Size: 300 * cs, ClusterSize: &cs, RefcountBits: &bits})
		s := mustOpen(t, mem{f}, config{})
		want := make([]byte, 300*cs)
		for range 40 {
			off := rnd.IntN(299) * int(cs)
			fill(rnd, want[off:off+int(cs)])
			if err := s.WriteAt(req(), blk.Buf(want[off:off+int(cs)]), int64(off), 0); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, s)
		damage(rnd, s, f.Poke)
		f.Poke(layout.OffIncompatFeatures, []byte{0, 0, 0, 0, 0, 0, 0, layout.IncompatDirty})
		s = mustOpen(t, mem{f}, config{})
		got := make([]byte, len(want))
		if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("seed %d: content after repair: %v", seed, err)
		}
		sound(t, s, true)
		if peek(s).hdr.IncompatibleFeatures != 0 {
			t.Fatalf("seed %d: still dirty", seed)
		}
		if err := s.WriteAt(req(), blk.Buf(got[:5*cs]), 7*int64(cs), 0); err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
		if missing != nil {
			continue
		}
		name := filepath.Join(t.TempDir(), fmt.Sprint(seed))
		if err := os.WriteFile(name, f.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("qemu-img", "check", name).CombinedOutput()
		if err != nil {
			t.Fatalf("seed %d: qemu-img check: %v\n%s", seed, err, out)
		}
	}
	if missing != nil {
		t.Log("SKIPPED: qemu-img is not installed and did not check the images")
	}
}

// damage writes garbage into refcount blocks and the refcount table.
func damage(rnd *rand.Rand, s *image, poke func(int64, []byte)) {
	entries := []uint64{0, 0x123, 1 << 40, uint64(peek(s).hdr.L1TableOffset), peek(s).reft[0]}
	for i, e := range peek(s).reft {
		if e == 0 {
			continue
		}
		switch rnd.IntN(3) {
		case 0:
			b := make([]byte, s.cs)
			if rnd.IntN(2) == 0 {
				fill(rnd, b)
			}
			poke(int64(e), b)
		case 1:
			poke(int64(peek(s).hdr.RefcountTableOffset)+int64(i)*8, be.AppendUint64(nil, entries[rnd.IntN(len(entries))]))
		}
	}
}
