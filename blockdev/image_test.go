package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/protocol/file"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func makeImage(m *Manager, name, backing string, size int64) (*Opened, error) {
	return m.makeImage(context.Background(), OpenImage{Filename: name, Format: new("qcow2")},
		&driver.Image{Size: size, Backing: backing, BackingFormat: "qcow2"})
}

// What cannot be made is refused before anything is touched; what a command began to make and
// cannot goes, and nothing else does.
func TestNewImageErrors(t *testing.T) {
	dir := t.TempDir()
	keep := strings.Repeat("precious", 1000)
	long := strings.Repeat("x", 1024)
	for _, c := range []struct {
		name, backing string
		size          int64
		want          string
		emptied       bool // if it was there
	}{
		{"host_device:FILE", "", 1 << 20, "Protocol driver 'host_device' does not support image creation, and opening the image failed: ", false},
		{"null-co:FILE", "", 1 << 20, "The only allowed filename for this driver is 'null-co://'", false},
		{"null-co://", "", 1 << 20, "Protocol driver 'null-co' does not support image creation", false},
		{"iscsi:FILE", "", 1 << 20, "Unknown protocol 'iscsi'", false},
		{"nbd:FILE", "", 1 << 20, "error parsing address '", false},
		{"FILE", long, 1 << 20, "Could not assign backing file '" + long + "' with format 'qcow2': Invalid argument", false},
		{"FILE", "FILE", 1 << 20, "Error: Trying to create an image with the same filename as the backing file", false},
		{"FILE", "", 1<<20 + 1, "Image size must be a multiple of 512 bytes", true},
		{"FILE", "", -512, "Could not resize image: Image size cannot be negative", true},
	} {
		for _, there := range []bool{false, true} {
			path := dir + "/image"
			if _ = os.Remove(path); there {
				writeFile(t, path, keep)
			}
			m := newManager(t, Config{})
			x, err := makeImage(m, strings.ReplaceAll(c.name, "FILE", path), strings.ReplaceAll(c.backing, "FILE", path), c.size)
			if err == nil {
				x.Discard()
			}
			if err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("%s: %v", c.name, err)
			}
			b, err := os.ReadFile(path)
			switch {
			case !there && !errors.Is(err, os.ErrNotExist):
				t.Errorf("%s: a file is left (%v)", c.name, err)
			case there && (err != nil || !c.emptied && string(b) != keep):
				t.Errorf("%s: the file that was there has changed (%v)", c.name, err)
			}
			clean(t, m, -1)
		}
	}
}

// Commands that make an image at one path keep out of each other's way until the image is
// published: one at most gets it, and its header is what that one wrote.
func TestNewImagesAtOnePath(t *testing.T) {
	dir := t.TempDir()
	path := dir + "/overlay"
	m := newManager(t, Config{})
	const clients = 8
	for i := range clients {
		create(t, fmt.Sprintf("%s/base%d", dir, i), "", "")
	}
	for round := range 20 {
		_ = os.Remove(path)
		var wg sync.WaitGroup
		var opened [clients]*Opened
		for i := range clients {
			wg.Go(func() {
				size := int64(1 << 20)
				if i%3 == 0 {
					size++ // fails after the file was made
				}
				x, err := makeImage(m, path, fmt.Sprintf("%s/base%d", dir, i), size)
				if opened[i] = x; err != nil {
					opened[i] = nil
				}
			})
		}
		wg.Wait()
		winners := 0
		for i, x := range opened {
			if x == nil {
				continue
			}
			winners++
			if name, _ := x.Node().Driver().(graph.Backed).BackingFile(); name != fmt.Sprintf("%s/base%d", dir, i) {
				t.Errorf("round %d: the overlay of client %d names %s", round, i, name)
			}
			if d, err := os.ReadFile(path); err != nil || !strings.Contains(string(d), fmt.Sprintf("%s/base%d", dir, i)) {
				t.Errorf("round %d: the image of client %d is not there: %v", round, i, err)
			}
			// While it is not published yet, nobody can make one there.
			if _, err := makeImage(m, path, "", 1<<20); err == nil {
				t.Error("an image was made over one that is being opened")
			}
			x.Discard()
		}
		if winners > 1 {
			t.Errorf("round %d: %d images in one file", round, winners)
		}
	}
	if x, err := makeImage(m, path, "", 1<<20); err != nil {
		t.Errorf("afterwards: %v", err)
	} else {
		x.Discard()
	}
	n := 0
	m.creating.Range(func(any, any) bool { n++; return true })
	if n > 0 {
		t.Errorf("%d files are still taken", n)
	}
}

// A file that is to be removed is told by its inode, and stays if somebody uses it.
func TestRemoveOnlyWhatWasMade(t *testing.T) {
	dir := t.TempDir()
	ctx, path := context.Background(), dir+"/f"
	var made driver.Made
	mk := func() {
		t.Helper()
		_ = os.Remove(path)
		o := &types.BlockdevCreateOptionsFile{Filename: path, Size: 1 << 20}
		if err := file.Create(ctx, o, func(f driver.Made) error { made = f; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	exists := func() bool { _, err := os.Lstat(path); return err == nil }
	mk()
	if made.Remove(); exists() {
		t.Error("the file is still there")
	}
	mk()
	if err := os.Rename(path, dir+"/mine"); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, "another's")
	if made.Remove(); !exists() {
		t.Error("another file was removed")
	}
	mk()
	m := newManager(t, Config{})
	mustAdd(t, m, `{'driver': 'raw', 'node-name': 'n', 'file': {'driver': 'file', 'filename': '`+path+`'}}`)
	root, err := m.OpenForCreate(ctx, &types.BlockdevRef{Reference: ptr("n")})
	if err != nil {
		t.Fatal(err)
	}
	if made.Remove(); !exists() {
		t.Error("a file in use was removed")
	}
	if err := m.Graph().CloseRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
	no := errors.New("no")
	for _, there := range []bool{true, false} {
		o := &types.BlockdevCreateOptionsFile{Filename: path}
		if err := file.Create(ctx, o, func(driver.Made) error { return no }); err != no {
			t.Errorf("refused: %v", err)
		}
		if st, err := os.Stat(path); there != (err == nil) || there && st.Size() != 1<<20 {
			t.Errorf("refused: %v", err)
		}
		_ = os.Remove(path)
	}
}

// blockdev-create writes no format into a header that an image cannot name, and finds out before it
// writes.
func TestCreateNamesFormats(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/f", strings.Repeat("keep", 256))
	m := newManager(t, Config{})
	for _, f := range []types.BlockdevDriver{"copy-before-write", "snapshot-access", "blkdebug", "preallocate"} {
		o := &types.BlockdevCreateOptionsQcow2{Size: 1 << 20, BackingFile: ptr("base"), BackingFmt: &f}
		o.File.Definition = options(t, `{'driver': 'file', 'filename': '`+dir+`/f'}`)
		err := m.Creator(&types.BlockdevCreateOptions{Driver: "qcow2", U: o})(context.Background(), func() {})
		if want := "An image cannot name a node of the driver '" + string(f) + "' as its backing file"; err == nil || err.Error() != want {
			t.Errorf("%s: %v", f, err)
		}
	}
	if b, err := os.ReadFile(dir + "/f"); err != nil || !strings.HasPrefix(string(b), "keep") {
		t.Errorf("the file has changed: %v", err)
	}
}

// A creation that was given up before its file was there takes none later: nobody would remove it.
func TestCreationGivenUpTakesNoFile(t *testing.T) {
	m := newManager(t, Config{})
	c := &creation{m: m}
	c.undo()
	id := graph.FileID{Dev: 1, Ino: 2}
	if err := c.take(driver.Made{ID: id}); err == nil {
		t.Error("it takes one")
	}
	c.end()
	if _, busy := m.creating.Load(id); busy {
		t.Error("the file is kept from others")
	}
}

// Two creations in one node never mix: while one is under way nobody else writes to the node or
// changes its size, and what is refused has changed nothing.
func TestCreationsAtOneNode(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/f", "")
	m := newManager(t, Config{})
	ctx := context.Background()
	mustAdd(t, m, `{'driver': 'file', 'node-name': 'f', 'filename': '`+dir+`/f'}`)
	qcow2 := func(size uint64, started func()) error {
		o := &types.BlockdevCreateOptionsQcow2{Size: size}
		o.File.Reference = ptr("f")
		return m.Creator(&types.BlockdevCreateOptions{Driver: "qcow2", U: o})(ctx, started)
	}
	others := 0
	err := qcow2(1<<20, func() {
		others++
		if err := qcow2(2<<20, func() { t.Error("a second creation has started") }); err == nil {
			t.Error("a second creation in the same node succeeded")
		}
		if err := m.Resize(ctx, nil, ptr("f"), 512, blk.PreallocOff); err == nil {
			t.Error("the node was resized")
		}
		o := options(t, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f'}`)
		if err := m.Add(ctx, o); err == nil {
			t.Error("what is being made was opened")
		}
		if st, err := os.Stat(dir + "/f"); err != nil || st.Size() != 0 {
			t.Errorf("something was written: %v", err)
		}
	})
	if err != nil || others != 1 {
		t.Fatalf("the first creation: %v", err)
	}
	if err := qcow2(2<<20, func() {}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 'q', 'file': 'f'}`)
	if n := m.g.Node("q").Size(); n != 2<<20 {
		t.Errorf("size %d", n)
	}
}
