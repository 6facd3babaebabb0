package file

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"qblockd/schema/types"
)

// mustXFS mounts a new XFS, or skips where that is not allowed.
func mustXFS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	image := mustFile(t, dir, "xfs", 320<<20)
	if out, err := exec.Command("mkfs.xfs", "-q", image).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: mkfs.xfs: %v %s", err, out)
	}
	dev, at := mustLoop(t, image), filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(dev, at, "xfs", 0, ""); err != nil {
		t.Skipf("SKIPPED: no XFS: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// TestExtentSizeHint: what a file was created with is shown, and nothing of one that has no hint.
func TestExtentSizeHint(t *testing.T) {
	at := mustXFS(t)
	no, own := uint64(0), uint64(64<<10)
	for name, c := range map[string]struct{ ask, want *uint64 }{
		"default": {nil, new(uint64(1 << 20))}, "own": {&own, &own}, "none": {&no, nil},
	} {
		o := types.BlockdevCreateOptionsFile{Filename: filepath.Join(at, name), Size: 1 << 20, ExtentSizeHint: c.ask}
		if err := Create(context.Background(), &o, nil); err != nil {
			t.Fatal(err)
		}
		var info types.ImageInfo
		mustOpen(t, settings{name: o.Filename}).ImageInfo(&info)
		if c.want == nil {
			if info.FormatSpecific != nil {
				t.Errorf("%s: %v is shown", name, info.FormatSpecific)
			}
			continue
		}
		w, ok := info.FormatSpecific.U.(*types.ImageInfoSpecificFileWrapper)
		if !ok || w.Data.ExtentSizeHint == nil || *w.Data.ExtentSizeHint != *c.want {
			t.Errorf("%s: %+v, want %d", name, info.FormatSpecific, *c.want)
		}
	}
}
