package qcow2

import (
	"bytes"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// labelled is an image with snapshots of these IDs and names, whether they can be told apart or
// not. Snapshot i has i+1 in its first cluster.
func labelled(t *testing.T, labels [][2]string) *drivertest.MemFile {
	t.Helper()
	f := mustCreate(t, CreateOptions{Size: 1 << 20})
	s := mustOpen(t, mem{f}, config{})
	for i := range labels {
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{byte(i + 1)}, 512)), 0, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0); err != nil {
			t.Fatal(err)
		}
	}
	list := slices.Clone(peek(s).snaps)
	for i, l := range labels {
		list[i].ID, list[i].Name = l[0], l[1]
	}
	s.mu.Lock()
	err := s.beginChange(req())
	if err == nil {
		err = s.endChange(req(), s.writeSnapshots(req(), list))
	}
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, s)
	return f
}

// firsts are the first bytes of the disk in all snapshots, in order.
func firsts(t *testing.T, s *image) (l []byte) {
	t.Helper()
	for i := range peek(s).snaps {
		view := atSnapshot(t, s, &peek(s).snaps[i])
		b := make([]byte, 1)
		if err := view.ReadAt(req(), blk.Buf(b), 0, 0); err != nil {
			t.Fatal(err)
		}
		_ = view.Close()
		l = append(l, b[0])
	}
	return l
}

// TestSnapshotsThatLookAlike: where snapshots share an ID or a name, the first one with both goes,
// and no other.
func TestSnapshotsThatLookAlike(t *testing.T) {
	labels := [][2]string{{"1", "a"}, {"1", "b"}, {"2", "a"}, {"2", "a"}, {"", ""}}
	for _, c := range []struct{ id, name, want string }{
		{"1", "a", "2345"}, {"1", "b", "1345"}, {"2", "a", "1245"}, {"", "", "1234"},
	} {
		f := labelled(t, labels)
		s := mustOpen(t, mem{f}, config{})
		if err := s.DeleteSnapshot(req(), c.id, c.name); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteSnapshot(req(), "2", "b"); err != errNoSnapshot {
			t.Errorf("one that is not there: %v", err)
		}
		mustClose(t, s)
		s = mustOpen(t, mem{f}, config{readOnly: true})
		got := ""
		for _, b := range firsts(t, s) {
			got += fmt.Sprint(b)
		}
		if got != c.want {
			t.Errorf("ID %q and name %q deleted: %s are left, want %s", c.id, c.name, got, c.want)
		}
		sound(t, s, false)
		mustClose(t, s)
	}
}

// TestNewSnapshotID: a new snapshot has an ID that no other has; if making it fails, no other goes.
func TestNewSnapshotID(t *testing.T) {
	for _, c := range []struct {
		ids  []string
		want string
	}{
		{nil, "1"},
		{[]string{"a", ""}, "1"},
		{[]string{"7", "3"}, "8"},
		{[]string{"5abc"}, "6"}, // as in QEMU
		{[]string{"007"}, "8"},
		{[]string{"4294967295", "4294967296"}, "4294967297"},
		{[]string{"18446744073709551614"}, "18446744073709551615"},
		{[]string{"18446744073709551615"}, "1"}, // QEMU: 0
		{[]string{"18446744073709551615", "1", "0", "3"}, "2"},
		{[]string{"99999999999999999999999", "1", "2", "2"}, "3"},
	} {
		labels := make([][2]string, len(c.ids))
		for i, id := range c.ids {
			labels[i] = [2]string{id, "n"}
		}
		f := labelled(t, labels)
		s := mustOpen(t, mem{f}, config{})
		id, err := s.CreateSnapshot(req(), "n", time.Unix(2, 0), 0)
		if err != nil || id != c.want {
			t.Errorf("beside %q: %q, %v, want %q", c.ids, id, err, c.want)
		}
		if err := s.DeleteSnapshot(req(), id, "n"); err != nil {
			t.Error(err)
		}
		if got := firsts(t, s); len(got) != len(c.ids) || len(got) > 0 && got[len(got)-1] != byte(len(got)) {
			t.Errorf("beside %q: %d are left", c.ids, got)
		}
		mustClose(t, s)

		fault := drivertest.NewFault(f)
		s = mustOpen(t, mem{fault}, config{})
		s.mu.Lock()
		err = s.vetAll(req()) // a survey goes on after one error
		s.mu.Unlock()
		if err != nil {
			t.Error(err)
		}
		fault.FailAt(0, syscall.EIO)
		if _, err := s.CreateSnapshot(req(), "n", time.Unix(2, 0), 0); err == nil {
			t.Error("no error")
		}
		fault.Clear()
		if got := firsts(t, s); len(got) != len(c.ids) {
			t.Errorf("beside %q one that cannot be made leaves %d", c.ids, got)
		}
		_ = s.Inactivate(req())
		_ = s.Close()
	}
}
