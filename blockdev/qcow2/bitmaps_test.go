package qcow2

import (
	"path/filepath"
	"slices"
	"testing"

	"qblockd/blockdev/qcow2/layout"
	"qblockd/schema/types"
)

// TestQemuBitmapList shows the bitmaps that qemu-img made as long as the image is not written to.
func TestQemuBitmapList(t *testing.T) {
	tool(t, "qemu-img")
	name := filepath.Join(t.TempDir(), "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", name, "1M")
	run(t, "qemu-img", "bitmap", "--add", name, "one")
	run(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "4096", name, "two")
	list := func(c config) []*types.Qcow2BitmapInfo {
		s := mustOpen(t, openOS(t, name), c)
		defer mustClose(t, s)
		return *s.info.bitmaps.Load()
	}
	l := list(config{readOnly: true})
	if len(l) != 2 || l[0].Name != "one" || l[0].Granularity != 65536 || !slices.Equal(l[0].Flags, []types.Qcow2BitmapInfoFlags{types.Qcow2BitmapInfoFlagsAuto}) ||
		l[1].Name != "two" || l[1].Granularity != 4096 || l[1].Flags == nil || len(l[1].Flags) != 0 {
		t.Fatalf("%+v", l)
	}
	if l := list(config{}); len(l) != 0 {
		t.Fatalf("bitmaps of a writable image: %+v", l)
	}
	if l := list(config{readOnly: true}); len(l) != 0 {
		t.Fatalf("bitmaps after a writable open: %+v", l)
	}
}

// TestBitmapDirectoryHostile refuses directories whose entries do not fill them.
func TestBitmapDirectoryHostile(t *testing.T) {
	good := make([]byte, 32)
	good[17], good[19], good[24] = 16, 1, 'x'
	if l, err := layout.ParseBitmapDirectory(good, 1); err != nil || len(l) != 1 || l[0].Name != "x" {
		t.Fatal(l, err)
	}
	for at, v := range map[int]byte{17: 32, 18: 4, 19: 0, 20: 255} {
		b := slices.Clone(good)
		b[at] = v
		if _, err := layout.ParseBitmapDirectory(b, 1); err == nil {
			t.Errorf("byte %d = %d is accepted", at, v)
		}
	}
	for _, n := range []uint32{0, 2, 1 << 31} {
		if _, err := layout.ParseBitmapDirectory(good, n); err == nil {
			t.Errorf("%d entries are accepted", n)
		}
	}
}
