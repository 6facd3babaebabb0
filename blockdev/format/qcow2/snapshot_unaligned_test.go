package qcow2

import (
	"bytes"
	"testing"
	"time"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// TestDeleteSnapshotUnaligned: an entry of a snapshot that points between two clusters refers to
// none of them, so deleting the snapshot frees neither: one of them is in use.
func TestDeleteSnapshotUnaligned(t *testing.T) {
	const cs = 64 << 10
	for _, extended := range []bool{false, true} {
		f := mustCreate(t, CreateOptions{Size: 1 << 20, Extended: extended})
		s := mustOpen(t, mem{f}, config{})
		write := func(gc int64, with byte) {
			t.Helper()
			if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{with}, cs)), gc*cs, 0); err != nil {
				t.Fatal(err)
			}
		}
		write(0, 1)
		write(1, 2) // behind it in the file
		id, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0)
		if err != nil {
			t.Fatal(err)
		}
		write(0, 3) // from now on the snapshot has a table, and that cluster, for itself
		write(1, 4)
		m, err := lookupAt(s, cs)
		if err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		l1, err := s.readTable(req(), int64(s.snaps[0].L1TableOffset), 1)
		s.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
		poked(t, f, u64(int64(l1.at(0)&layout.OffsetMask), uint64(m.host-cs/2)))
		s = mustOpen(t, mem{f}, config{})
		if err := s.DeleteSnapshot(req(), id, "s"); err != nil {
			t.Fatal(err)
		}
		if err := s.Flush(req()); err != nil {
			t.Fatal(err)
		}
		for gc := range int64(8) {
			write(8+gc, 9) // takes what is free
		}
		b := make([]byte, cs)
		if err := s.ReadAt(req(), blk.Buf(b), cs, 0); err != nil || b[0] != 4 || b[cs-1] != 4 {
			t.Errorf("extended %v: %v, %d instead of 4", extended, err, b[0])
		}
		sound(t, s, true)
		mustClose(t, s)
	}
}
