package ctl

import (
	"os/exec"
	"strings"
	"testing"

	"qblockd/tests/daemon"
)

// TestResize changes the sizes of files and of a running daemon's images.
func TestResize(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: qemu-img is not installed")
	}
	t.Setenv("QBLOCKD", daemon.Binary(t))
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	image, busy, raw := d.Dir+"/a.qcow2", d.Dir+"/b.qcow2", d.Dir+"/c.raw"
	for _, args := range []string{
		"qemu-img create -q -f qcow2 " + image + " 1M", "qemu-img create -q -f qcow2 " + busy + " 1M",
		"qemu-img create -q -f raw " + raw + " 1M",
	} {
		if out, err := exec.Command("sh", "-c", args).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", args, err, out)
		}
	}
	q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "b", map[string]any{"file": daemon.File(busy)}))
	for _, s := range []step{
		{"resize " + image + " 2M", 0, ""},
		{"resize --preallocation full " + image + " +2M", 0, ""},
		{"resize " + image + " 1M", 1, "--shrink makes it smaller"},
		{"resize " + image + " -- -1M", 1, "--shrink makes it smaller"},
		{"resize --shrink " + image + " -1M", 2, "a SIZE that begins with - goes behind --"},
		{"resize --shrink " + image + " -- -1M", 0, ""},
		{"resize --shrink " + image + " -- -9M", 1, "larger than zero"},
		{"resize " + image + " 3145729", 1, "multiple of 512"},
		{"resize " + image + " 3X", 2, "is no size"},
		{"resize --preallocation some " + image + " 3M", 2, "off, metadata, falloc or full"},
		{"resize " + busy + " 3M", 1, "Failed to get"},
		{"resize --node b --preallocation metadata 3M", 0, ""},
		{"resize --node nope 3M", 1, "there is no node 'nope'"},
		{"resize --node b " + image + " 3M", 2, "a FILE, or --node, and a SIZE"},
		{"resize -f raw --preallocation falloc " + raw + " 4M", 0, ""},
		{"resize " + raw, 2, "a FILE, or --node, and a SIZE"},
	} {
		out, said, code := ctl(t, d, "", strings.Fields(s.words)...)
		if code != s.code || !strings.Contains(out+said, s.said) {
			t.Errorf("%s: exit %d, %q, %q; expected %d and %q", s.words, code, out, said, s.code, s.said)
		}
	}
	d.Stop(t)
	for file, want := range map[string]string{image: "virtual size: 3 MiB", busy: "virtual size: 3 MiB", raw: "virtual size: 4 MiB"} {
		out, err := exec.Command("qemu-img", "info", file).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v %s", file, err, out)
		}
	}
	for _, file := range []string{image, busy} {
		if out, err := exec.Command("qemu-img", "check", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v %s", file, err, out)
		}
	}
}
