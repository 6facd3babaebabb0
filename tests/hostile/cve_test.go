package hostile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"qblockd/tests/daemon"
)

// known are faults of QEMU that were given numbers, as damage. The numbers are in names of tests;
// those that are not here are listed in the package comment.
var known = []struct {
	cve    string
	bases  []string
	damage []string // one of these each
}{
	// A header that makes the reader divide by zero or go round for ever.
	{"2014_0142", []string{"v3-64k", "v2-64k"}, []string{"cluster_bits = 0", "cluster_bits = all ones", "cluster_bits = the sign bit", "size = 0", "l1_size = 0",
		"refcount_table_clusters = 0", "b0.granularity_bits = 0", "b0.granularity_bits = all ones", "refcount_order = all ones", "refcount_order = 2^4"}},
	// Sizes whose product does not fit: L1 tables of snapshots, growing L1 tables, indices of
	// refcounts.
	{"2014_0143", []string{"v3-64k", "v3-512"}, []string{"s0.l1_size = 2^28", "s0.l1_size = all ones", "s0.l1_size = the sign bit", "l1_size = 2^28",
		"reftable[0] = the last below 2^56", "reftable[0] = 2^62", "l2.data = the last below 2^56", "l2.data2 = 2^55", "nb_snapshots = 2^28", "size = below the sign bit"}},
	// Fields of the header that nobody checked.
	{"2014_0144", []string{"v3-64k", "v2-64k", "over-raw"}, []string{"header_length = all ones", "header_length = 2^16", "header_length = 0", "backing_file_size = all ones",
		"backing_file_offset = all ones", "ext[0x0].length = all ones", "ext[0x6803f857].length = all ones", "ext[0xe2792aca].length = the sign bit",
		"refcount_table_clusters = 2^28", "refcount_table_clusters = all ones", "refcount_table_offset = 2^62", "refcount_table_offset = one more", "snapshots_offset = one more",
		"snapshots_offset = 2^63", "l1_table_offset = one more", "l1_size = below the sign bit", "nb_snapshots = all ones"}},
	// A snapshot whose L1 table is longer than the disk's is read into a buffer made for the disk's.
	{"2014_0145", []string{"v3-64k", "v2-512"}, []string{"s0.l1_size = 2^9", "s0.l1_size = 2^16", "s0.l1_size = 2^20", "s1.l1_size = all ones", "s0.l1_size = one more", "s0.l1_size = 0"}},
	// Opening fails after the fields of snapshots were read.
	{"2014_0146", []string{"v3-64k", "v2-64k"}, []string{"nb_snapshots = 2^9", "nb_snapshots = 2^16", "s0.extra_data_size = all ones", "s1.l1_size = the sign bit", "snapshots_offset = the end of the file",
		"length = up to snapshots", "length = up to the middle of snapshots"}},
	// Where a free cluster is looked for, and what is added to the number of it.
	{"2014_0147", []string{"v3-64k", "width-64"}, []string{"reftable[7] = the last below 2^56", "reftable[2] = all ones", "refcount_table_clusters = 2^16", "refcount_table_clusters = 2^9",
		"refcount.after = the most", "refcount.data = the most", "reftable[0] = 0"}},
	// Work without bound: a few kilobytes that say the same over and over.
	{"2015_4106_like", []string{"v3-64k", "width-1-2m"}, []string{"reftable = 8 MiB that name refblock",
		"reftable = 8 MiB that name data", "reftable = 8 MiB that name an empty block, after 0x0", "l1 = 262144 entries that name one table, flags 0x0",
		"size = 2^50 and as many tables", "bitmaps = 600 with names of 6 bytes and 1048576 entries, flags 2",
		"snapshots = 65535 with IDs of 5 and names of 1 bytes"}},
}

// TestCVE runs what clients do on images as they are described in those reports, some with each
// choice of what that is.
func TestCVE(t *testing.T) {
	byName := map[string]*Base{}
	for _, s := range Specs {
		byName[s.Name] = NewBase(s)
	}
	w := &worker{h: &hunt{t: t, kept: t.TempDir(), kinds: map[string][]int{}}, bin: *flagBinary, dir: scratch(t)}
	if w.bin == "" {
		w.bin = daemon.Binary(t)
	}
	defer w.end()
	for _, k := range known {
		t.Run("CVE_"+k.cve, func(t *testing.T) {
			w.h.t = t
			number := 1 << 40 // none of a hunt's
			found := map[string]bool{}
			for _, name := range k.bases {
				for _, d := range byName[name].Damages(Names(imageName)) {
					for _, want := range k.damage {
						if d.String() != want {
							continue
						}
						found[want] = true
						for range 2 {
							number++
							w.one(&Case{number, byName[name], []*Damage{d}})
						}
					}
				}
			}
			for _, want := range k.damage {
				if !found[want] {
					t.Errorf("none of %v has the damage %s", strings.Join(k.bases, ", "), want)
				}
			}
		})
	}
	w.h.t = t
}

// TestCVE_2008_0928: requests that begin or end beyond the end of a disk fail, whatever their
// numbers add up to, and change nothing.
func TestCVE_2008_0928(t *testing.T) {
	const size = 1 << 20
	dir := t.TempDir()
	for name, b := range map[string][]byte{"raw": bytes.Repeat([]byte{7}, size), "behind": bytes.Repeat([]byte{9}, 2*size)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := NewBase(Spec{Version: 3, ClusterBits: 16, Order: 4, Size: size}).WriteTo(filepath.Join(dir, "qcow2")); err != nil {
		t.Fatal(err)
	}
	d := daemon.Start(t, dir, "--blockdev", "file,node-name=raw,filename=raw", "--export", "nbd,id=raw,node-name=raw,writable=on",
		"--blockdev", "qcow2,node-name=qcow2,file.driver=file,file.filename=qcow2", "--export", "nbd,id=qcow2,node-name=qcow2,writable=on",
		// A window: behind it the file goes on.
		"--blockdev", "raw,node-name=part,size=1048576,file.driver=file,file.filename=behind", "--export", "nbd,id=part,node-name=part,writable=on")
	for _, export := range []string{"raw", "qcow2", "part"} {
		n, err := d.DialNBD(export)
		if err != nil {
			t.Fatal(err)
		}
		before := make([]byte, size)
		if err := n.ReadAt(before, 0); err != nil {
			t.Fatal(err)
		}
		buf := bytes.Repeat([]byte{1}, 4096)
		for _, off := range []int64{size - 512, size, size + 512, 1 << 40, 1<<63 - 4096, -1 << 63, -4096, -512} {
			for what, f := range map[string]func() error{
				"read":  func() error { return n.ReadAt(make([]byte, 4096), off) },
				"write": func() error { return n.WriteAt(buf, off) },
				"fua":   func() error { return n.WriteFUA(buf, off) },
				"zero":  func() error { return n.Zero(off, 4096) },
				"trim":  func() error { return n.Trim(off, 4096) },
			} {
				var errno syscall.Errno
				if err := f(); !errors.As(err, &errno) {
					t.Fatalf("%s: %s of 4096 bytes at %#x: %v", export, what, uint64(off), err)
				}
			}
		}
		after := make([]byte, size)
		if err := n.ReadAt(after, 0); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: its content has changed, %v", export, err)
		}
		n.Close()
	}
	d.Stop(t)
	if b, err := os.ReadFile(filepath.Join(dir, "behind")); err != nil || len(b) != 2*size || bytes.Count(b, []byte{9}) != len(b) {
		t.Error("what lies behind a window has changed")
	}
	if i, err := os.Stat(filepath.Join(dir, "raw")); err != nil || i.Size() != size {
		t.Errorf("the file has another size: %v", err)
	}
}

// TestCVETable: each test that the package comment names is there.
func TestCVETable(t *testing.T) {
	text, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^//\tCVE-\S+ .* (\S+) (Test\w+)$`).FindAllSubmatch(text, -1)
	if len(rows) < 13 {
		t.Errorf("%d rows", len(rows))
	}
	for _, row := range rows {
		files, err := filepath.Glob(filepath.Join("../..", string(row[1]), "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || bytes.Contains(b, []byte("func "+string(row[2])+"("))
		}
		if !found {
			t.Errorf("%s has no %s", row[1], row[2])
		}
	}
}
