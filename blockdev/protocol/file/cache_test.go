package file

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"qblockd/schema/types"
)

// TestDropCache: the pages of a file that was just written are cached, and gone if that is asked
// for.
func TestDropCache(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	content := make([]byte, 3<<20)
	for i := range content {
		content[i] = byte(i)
	}
	if err := os.WriteFile(name, content, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if memory, _ := storageOf(int(f.Fd())); memory {
		t.Skip("SKIPPED: the folder for tests is in memory, which never forgets")
	}
	on, off := true, false
	try := func(drop, check *bool) {
		t.Helper()
		if err := checkDropped(int(f.Fd())); err == nil { // read since
			if _, err := os.ReadFile(name); err != nil {
				t.Fatal(err)
			}
		}
		s := settings{name: name, driver: "file"}
		s.setCache(&types.BlockdevOptionsFile{DropCache: drop, XCheckCacheDropped: check})
		d, err := openDisk(context.Background(), s)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
	for _, c := range []struct {
		drop, check *bool
		dropped     bool
	}{{nil, nil, false}, {&on, nil, true}, {nil, &on, true}, {&off, &on, false}, {&on, &on, true}, {nil, &off, false}} {
		try(c.drop, c.check)
		if dropped := checkDropped(int(f.Fd())) == nil; dropped != c.dropped {
			t.Errorf("%+v: dropped: %v", c, dropped)
		}
	}
}

// TestCacheNotDropped: memory keeps its pages, which the check tells.
func TestCacheNotDropped(t *testing.T) {
	f, err := os.CreateTemp("/dev/shm", "qblockd-test")
	if err != nil {
		t.Skip("SKIPPED: no file system in memory")
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(make([]byte, 64<<10)); err != nil {
		t.Fatal(err)
	}
	on := true
	s := settings{name: f.Name(), driver: "file"}
	s.setCache(&types.BlockdevOptionsFile{XCheckCacheDropped: &on})
	if _, err := openDisk(context.Background(), s); err != errCached {
		t.Error(err)
	}
}
