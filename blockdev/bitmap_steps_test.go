package blockdev

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// TestBitmapsUnderLoad adds, enables, disables, merges and removes persistent bitmaps while clients
// write. The image as it is at the end, with nobody there to close it, has all bitmaps, with what
// they had recorded.
func TestBitmapsUnderLoad(t *testing.T) {
	dir := t.TempDir()
	file, left := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "left.qcow2")
	create(t, file, "", "")
	m := newManager(t, Config{})
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'file': {'driver': 'file', 'filename': '%s'}}`, file))
	n := m.Graph().Node("q")
	run := func(s *BitmapStep) {
		t.Helper()
		if err := transaction.Run(context.Background(), m.Graph(), s); err != nil {
			t.Fatal(err)
		}
	}
	yes := true
	add := func(name string, disabled bool, g uint32) {
		t.Helper()
		run(m.BitmapAdd(&types.BlockDirtyBitmapAdd{
			Node: "q", Name: name, Persistent: &yes, Disabled: &disabled, Granularity: &g,
		}))
	}
	add("first", false, 512)
	root := drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { writer(t, n, root, &stop, byte(i)) })
	}
	first := []*types.BlockDirtyBitmapOrStr{{Local: new("first")}}
	for i := range 15 {
		name := fmt.Sprint("b", i)
		b := &types.BlockDirtyBitmap{Node: "q", Name: name}
		add(name, i%2 == 0, 4096)
		run(m.BitmapEnable(b, true))
		run(m.BitmapMerge(&types.BlockDirtyBitmapMerge{Node: "q", Target: name, Bitmaps: first}))
		run(m.BitmapEnable(b, i%3 == 0))
		run(m.BitmapClear(b))
		if i%4 != 0 {
			run(m.BitmapRemove(b))
		}
	}
	stop.Store(true)
	wg.Wait()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, left, string(raw))
	other := newManager(t, Config{})
	mustAdd(t, other, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'read-only': true, 'file': {'driver': 'file', 'filename': '%s'}}`, left))
	was, is := n.Bitmaps().All(), other.Graph().Node("q")
	if len(was) != len(is.Bitmaps().All()) {
		t.Fatalf("%d bitmaps of %d are left", len(is.Bitmaps().All()), len(was))
	}
	for _, b := range was {
		d := is.Bitmaps().Find(b.Name())
		if d == nil || d.Inconsistent() || d.Enabled() != b.Enabled() {
			t.Fatalf("bitmap %s: %+v", b.Name(), d)
		}
		all := d.Bits().Clone()
		all.Merge(b.Bits())
		if all.Count() != d.Bits().Count() {
			t.Errorf("bitmap %s is short", b.Name())
		}
	}
}

// TestBitmapsOfHugeDisks: bitmaps cost what is set in them, however large the disk is and however
// small their granules are.
func TestBitmapsOfHugeDisks(t *testing.T) {
	m := newManager(t, Config{})
	const size = int64(1) << 61
	mustAdd(t, m, fmt.Sprintf(`{'driver': 'null-co', 'node-name': 'n', 'size': %d}`, size))
	n := m.Graph().Node("n")
	run := func(s *BitmapStep) {
		t.Helper()
		if err := transaction.Run(context.Background(), m.Graph(), s); err != nil {
			t.Fatal(err)
		}
	}
	for name, g := range map[string]uint32{"fine": 512, "usual": 64 << 10, "coarse": 1 << 31} {
		run(m.BitmapAdd(&types.BlockDirtyBitmapAdd{Node: "n", Name: name, Granularity: &g}))
	}
	root := drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(20) {
		if err := root.WriteAt(r, blk.Buf(make([]byte, 4096)), i*(size/20)&^4095, 0); err != nil {
			t.Fatal(err)
		}
	}
	root.End(r)
	n.Bitmaps().Find("usual").Bits().Set(1<<40, 1<<60)
	names := []*types.BlockDirtyBitmapOrStr{{Local: ptr("fine")}, {Local: ptr("usual")}, {Local: ptr("coarse")}}
	for _, name := range names {
		run(m.BitmapMerge(&types.BlockDirtyBitmapMerge{Node: "n", Target: *name.Local, Bitmaps: names}))
	}
	for _, b := range n.Bitmaps().States() {
		if want := int64(1<<60) + 12<<31; b.Count < want-1<<33 || b.Count > want+1<<33 {
			t.Errorf("%s has %d bytes, want %d", b.Name, b.Count, want)
		}
		if used := n.Bitmaps().Find(b.Name).Bits().Memory(); used > 1<<20 {
			t.Errorf("%s takes %d bytes", b.Name, used)
		}
		_, err := m.BitmapSHA256(context.Background(), "n", b.Name)
		if digested := b.Granularity == 1<<31; (err == nil) != digested {
			t.Errorf("digest of %s: %v", b.Name, err)
		}
		run(m.BitmapClear(&types.BlockDirtyBitmap{Node: "n", Name: b.Name}))
		run(m.BitmapRemove(&types.BlockDirtyBitmap{Node: "n", Name: b.Name}))
	}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	run(m.BitmapAdd(&types.BlockDirtyBitmapAdd{Node: "n", Name: "b", Granularity: ptr(uint32(1 << 31))}))
	if _, err := m.BitmapSHA256(cancelled, "n", "b"); err == nil {
		t.Error("a digest goes on when nobody wants it any more")
	}
}

func ptr[T any](x T) *T { return &x }
