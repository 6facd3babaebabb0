package blockdev

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// headers are beginnings of files that QEMU takes for images, by format.
var headers = map[string]string{
	"qcow2":     "QFI\xfb\x00\x00\x00\x03",
	"qcow2 v2":  "QFI\xfb\x00\x00\x00\x02",
	"qcow2 v99": "QFI\xfb\x00\x00\x00\x63",
	"qcow":      "QFI\xfb\x00\x00\x00\x01",
	"qed":       "QED\x00",
	"vmdk":      "KDMV",
	"vmdk 3":    "COWD",
	"vmdk text": "# Disk DescriptorFile\n# more\n  \r\nversion=1\r\n",
	"vmdk bare": "version=3\n",
	"vdi":       strings.Repeat("x", 0x40) + "\x7f\x10\xda\xbe",
	"vhdx":      "vhdxfile",
	"vpc":       "conectix",
	"parallels": "WithoutFreeSpace\x02\x00\x00\x00",
	"luks":      "LUKS\xba\xbe",
	"bochs":     "Bochs Virtual HD Image" + strings.Repeat("\x00", 10) + "Redolog" + strings.Repeat("\x00", 9) + "Growing" + strings.Repeat("\x00", 9) + "\x00\x00\x02\x00",
	"cloop":     "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
}

func sectorOf(head string) []byte { return append([]byte(head), make([]byte, 512-len(head))...) }

func TestGuess(t *testing.T) {
	m := newManager(t, Config{})
	for name, head := range headers {
		format, _, _ := strings.Cut(name, " ")
		d, err := m.guess(sectorOf(head), "")
		switch {
		case format == "qcow2":
			if err != nil || d.Name != "qcow2" {
				t.Errorf("%s: %v, %v", name, d, err)
			}
		case err == nil || err.Error() != "Unknown driver '"+format+"'":
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	for _, head := range []string{"", "QFI\xfb", "QFI", "QEDx", "# Disk DescriptorFile\n\nversion=1\n", "version=4\n", "# version=1\n", "WithoutFreeSpace", "Bochs Virtual HD Image", "\x7fELF", " x\nversion=1\n", "#"} {
		if d, err := m.guess(sectorOf(head), "x.img"); err != nil || d.Name != "raw" {
			t.Errorf("%q: %v, %v", head, d, err)
		}
	}
	if _, err := m.guess(sectorOf(""), "/a/b.dmg"); err == nil || err.Error() != "Unknown driver 'dmg'" {
		t.Errorf("dmg: %v", err)
	}
}

// guessed opens a file of 64 KiB, which nobody says the format of, for writing.
func guessed(t *testing.T, m *Manager, name string) *graph.Root {
	t.Helper()
	writeFile(t, name, strings.Repeat("r", 64<<10))
	return openGuessed(t, m, name)
}

func openGuessed(t *testing.T, m *Manager, name string) *graph.Root {
	t.Helper()
	x, err := m.OpenImage(context.Background(), OpenImage{Filename: name, Name: "g", Mode: new(types.NewImageModeExisting)})
	if err != nil {
		t.Fatal(err)
	}
	tx := m.Graph().Begin(context.Background())
	defer tx.Abort()
	claim := perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All}
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: claim, Kind: graph.KindBackend}, x.Node())
	if err == nil {
		err = x.Publish(tx)
	}
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	x.Done()
	t.Cleanup(func() { _ = m.Graph().CloseRoot(context.Background(), root) })
	return root
}

// CVE-2008-2004: a guest writes the header of an image into its raw disk; the next time the disk is
// opened its format is guessed, and the header leads to any file of the host.
func TestCVE_2008_2004(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	m := newManager(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	root := guessed(t, m, dir+"/disk")
	if n := strings.Count(log.String(), "guessed to be raw"); n != 1 {
		t.Errorf("warned %d times: %s", n, log.String())
	}
	e, ctx := root.Edge(), context.Background()
	do := func(f func(r *blk.Req) error) error {
		r, err := root.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer root.End(r)
		return f(r)
	}
	head := func() string {
		b, err := os.ReadFile(dir + "/disk")
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:512])
	}
	before := head()
	for name, magic := range headers {
		for what, f := range map[string]func(r *blk.Req) error{
			"sector": func(r *blk.Req) error { return e.WriteAt(r, blk.Buf(sectorOf(magic)), 0, 0) },
			"large": func(r *blk.Req) error {
				return e.WriteAt(r, blk.Buf(append(sectorOf(magic), make([]byte, 8192)...)), 0, blk.FUA)
			},
			"unaligned": func(r *blk.Req) error { return e.WriteAt(r, blk.Buf([]byte(magic)), 0, 0) },
			"in buffers": func(r *blk.Req) error {
				return e.WriteAt(r, blk.Bufs([][]byte{[]byte(magic[:3]), sectorOf(magic)[3:]}), 0, 0)
			},
			"unchanged": func(r *blk.Req) error { return e.WriteAt(r, blk.Buf(sectorOf(magic)), 0, blk.WriteUnchanged) },
		} {
			if err := do(f); blk.Errno(err) != syscall.EPERM {
				t.Errorf("%s, %s: %v", name, what, err)
			}
			if got := head(); got != before {
				t.Fatalf("%s, %s: the disk begins with %q", name, what, got)
			}
		}
	}
	// Byte by byte the one that completes it is refused.
	for i, c := range []byte("QFI\xfb\x00\x00\x00\x03") {
		err := do(func(r *blk.Req) error { return e.WriteAt(r, blk.Buf([]byte{c}), int64(i), 0) })
		if got := head(); strings.HasPrefix(got, headers["qcow2"]) || strings.HasPrefix(got, headers["qcow"]) {
			t.Fatalf("after byte %d the disk begins with %q", i, got[:8])
		} else if err != nil && blk.Errno(err) != syscall.EPERM {
			t.Errorf("byte %d: %v", i, err)
		}
	}
	for what, f := range map[string]func(r *blk.Req) error{
		"data":    func(r *blk.Req) error { return e.WriteAt(r, blk.Buf(bytes.Repeat([]byte("y"), 4096)), 0, 0) },
		"later":   func(r *blk.Req) error { return e.WriteAt(r, blk.Buf(sectorOf(headers["qcow2"])), 512, 0) },
		"zero":    func(r *blk.Req) error { return e.Zero(r, 0, 4096, blk.MayUnmap) },
		"discard": func(r *blk.Req) error { return e.Discard(r, 0, 4096) },
	} {
		if err := do(f); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// What is copied in the kernel is looked at as well: it is copied by hand then.
func TestGuessedRawCopyRange(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/evil", string(sectorOf(headers["qcow2"]))+strings.Repeat("e", 4096-512))
	m := newManager(t, Config{})
	root := guessed(t, m, dir+"/disk")
	f, err := os.Open(dir + "/evil")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	src := []blk.HostRange{{FD: int(f.Fd()), Off: 0, N: 4096}}
	if err := root.Edge().CopyFrom(r, 0, src, 0); err == nil {
		t.Error("a header was copied")
	}
	if b, err := os.ReadFile(dir + "/disk"); err != nil || b[0] != 'r' {
		t.Errorf("the disk begins with %q", b[:8])
	}
}

// A window that a reopen puts into the first sector leaves it guarded.
func TestGuessedRawAfterReopen(t *testing.T) {
	dir := t.TempDir()
	m := newManager(t, Config{})
	writeFile(t, dir+"/disk", string(sectorOf("QFI\xfb\x00\x00\x00"))+strings.Repeat("r", 4096))
	root := openGuessed(t, m, dir+"/disk")
	n := m.Graph().Node("g")
	file := n.File().Node().Name()
	write := func(off int64, b string) error {
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer root.End(r)
		return root.Edge().WriteAt(r, blk.Buf([]byte(b)), off, 0)
	}
	for _, opts := range []string{``, `, 'offset': 7`, `, 'offset': 4`} {
		o := options(t, `{'driver': 'raw', 'node-name': 'g', 'file': '`+file+`'`+opts+`}`)
		if err := m.Reopen([]*types.BlockdevOptions{o}).Run(context.Background()); err != nil {
			t.Fatalf("%s: %v", opts, err)
		}
		off := int64(7)
		switch opts {
		case `, 'offset': 7`:
			off = 0
		case `, 'offset': 4`:
			off = 3
		}
		if err := write(off, "\x02"); blk.Errno(err) != syscall.EPERM {
			t.Errorf("%s: %v", opts, err)
		}
		if err := write(off+2048, "\x02"); err != nil {
			t.Errorf("%s, behind: %v", opts, err)
		}
	}
}
