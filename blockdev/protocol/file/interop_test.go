package file

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestMapLikeQEMU compares our block status with qemu-img's, on files that either made.
func TestMapLikeQEMU(t *testing.T) {
	qemuImg := tool(t, "qemu-img")
	dir := t.TempDir()
	ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
	for _, m := range []types.PreallocMode{"off", "falloc", "full"} {
		o := &types.BlockdevCreateOptionsFile{Filename: ours, Size: 3 << 20, Preallocation: &m}
		if err := Create(context.Background(), o, nil); err != nil {
			t.Fatal(err)
		}
		if out, err := run(qemuImg, "create", "-f", "raw", "-o", "preallocation="+string(m), theirs, "3M"); err != nil {
			t.Fatal(out)
		}
		var st [2]os.FileInfo
		for i, name := range []string{ours, theirs} {
			d := mustOpen(t, settings{name: name})
			if err := d.WriteAt(bg, blk.Buf(pattern(64<<10, 1)), 1<<20, 0); err != nil {
				t.Fatal(err)
			}
			if err := d.Zero(bg, 2<<20, 256<<10, blk.MayUnmap); err != nil {
				t.Fatal(err)
			}
			if err := d.Flush(bg); err != nil {
				t.Fatal(err)
			}
			st[i], _ = os.Stat(name)
			out, err := run(qemuImg, "map", "-f", "raw", "--output=json", name)
			if err != nil {
				t.Fatal(out)
			}
			var want []struct {
				Start, Length, Offset int64
				Zero, Data, Present   bool
			}
			if err := json.Unmarshal([]byte(out), &want); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			for _, w := range want {
				e, err := d.Status(bg, w.Start, d.Size()-w.Start)
				if err != nil || e.N != w.Length || e.Data != w.Data || e.Zero != w.Zero ||
					e.MapOff != w.Offset || e.Allocated != w.Present {
					t.Errorf("%s of %s: qemu-img %+v, we %+v (%v)", m, filepath.Base(name), w, e, err)
				}
			}
			d.Close()
		}
		if a, b := st[0].Size(), st[1].Size(); a != b {
			t.Errorf("%s: sizes %d and %d", m, a, b)
		}
	}
}
