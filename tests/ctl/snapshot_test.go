package ctl

import (
	"os/exec"
	"strings"
	"testing"

	"qblockd/tests/daemon"
)

// TestSnapshotAndMeasure works on the snapshots of files and of a running daemon's images, and asks
// how large copies of them would be.
func TestSnapshotAndMeasure(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("SKIPPED: qemu-img is not installed")
	}
	t.Setenv("QBLOCKD", daemon.Binary(t))
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	image, busy := d.Dir+"/a.qcow2", d.Dir+"/b.qcow2"
	for _, args := range []string{
		"qemu-img create -q -f qcow2 " + image + " 1M", "qemu-img create -q -f qcow2 " + busy + " 1M",
		"qemu-io -f qcow2 -c 'write -P 1 0 1M' " + image,
	} {
		if out, err := exec.Command("sh", "-c", args).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", args, err, out)
		}
	}
	q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "b", map[string]any{"file": daemon.File(busy)}))
	for _, s := range []step{
		{"snapshot " + image, 0, ""},
		{"snapshot -c one " + image, 0, ""},
		{"snapshot -c one " + image, 1, "Snapshot with name 'one' already exists"},
		{"snapshot -l " + image, 0, "one"},
		{"measure -f qcow2 -O qcow2 " + image, 0, "required size: 1376256"},
		{"snapshot -a 1 " + image, 0, ""},
		{"snapshot -a two " + image, 1, "there is no snapshot 'two'"},
		{"snapshot -d one " + image, 0, ""},
		{"snapshot -a one " + image, 1, "there is no snapshot 'one'"},
		{"snapshot -l -c x " + image, 2, "one of -l, -c, -a and -d"},
		{"snapshot -c x " + busy, 1, "Failed to get"},
		{"snapshot -c x --node b", 0, ""},
		{"snapshot --node b", 0, "x"},
		{"snapshot -a x --node b", 0, ""},
		{"snapshot -d x --node b", 0, ""},
		{"snapshot --node c", 1, "there is no node 'c'"},
		{"snapshot -c seen " + image, 0, ""},
		{"measure -O qcow2 -l seen " + image, 0, "required size: 1376256"},
		{"measure -O qcow2 -l 9 " + image, 1, "9"},
		{"measure -O qcow2 -l seen --size 1G", 2, "-l and --password-file are for a FILE"},
		{"measure --size 1G", 0, "fully allocated size: 1073741824"},
		{"measure -O qcow2 -o cluster_size=2M,extended_l2=on,compat=1.1,lazy_refcounts=on --size 1G", 0, "fully allocated size: 1"},
		{"measure -O qcow2 -o cluster_size=3 --size 1G", 1, "Cluster size must be a power of two"},
		{"measure -O qcow2 -o hm=3 --size 1G", 2, "Invalid parameter 'hm'"},
		{"measure -O qcow2 --node b --output json", 0, "\"bitmaps\": 0"},
		{"measure -O vmdk --size 1", 1, "vmdk"},
		{"measure", 2, "--size, a FILE, or --node"},
	} {
		out, said, code := ctl(t, d, "", strings.Fields(s.words)...)
		if code != s.code || !strings.Contains(out+said, s.said) {
			t.Errorf("%s: exit %d, %q, %q; expected %d and %q", s.words, code, out, said, s.code, s.said)
		}
	}
	// A node that shows a snapshot is read-only, and one that others use stays what it is.
	view := daemon.Blockdev("qcow2", "v", map[string]any{"file": daemon.File(image), "x-qblockd-snapshot": "seen"})
	if _, err := q.Do("blockdev-add", view); err == nil || !strings.Contains(err.Error(), "Device is not readonly") {
		t.Errorf("a snapshot that could be written to: %v", err)
	}
	view["read-only"] = true
	q.Must(t, "blockdev-add", view)
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "v", "node-name": "v"})
	q.Must(t, "blockdev-snapshot-internal-sync", map[string]any{"device": "b", "name": "x"})
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "b", "node-name": "b", "writable": true})
	if out, said, code := ctl(t, d, "", "snapshot", "-a", "x", "--node", "b"); code != 1 || !strings.Contains(said, "Permission conflict on node") {
		t.Errorf("a node with an export: exit %d, %q, %q", code, out, said)
	}
	d.Stop(t)
}
