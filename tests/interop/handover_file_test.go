package interop

import (
	"bytes"
	"path/filepath"
	"testing"

	"qblockd/tests/daemon"
)

// The file of a node that was opened inactive may have stayed active, as QEMU's clients leave it:
// then what another process has appended to it since is seen all the same.
func TestHandoverOfGrownFile(t *testing.T) {
	t.Parallel()
	need(t, "qemu-img")
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	sh(t, dir, "qemu-img create -q -f qcow2 image 8M")
	start := func(active bool) (*daemon.QMP, string) {
		d := daemon.StartBinary(t, daemon.Binary(t), t.TempDir())
		q := d.Dial(t)
		file := daemon.Blockdev("file", "f", map[string]any{"filename": image})
		q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "d", map[string]any{"file": file, "active": active}))
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "d", "name": "d",
			"writable": true, "allow-inactive": true})
		return q, d.NBDSocket()
	}
	source, from := start(true)
	target, to := start(false)
	want := bytes.Repeat([]byte("handed over."), 1<<20)[:4<<20]
	dial := func(socket string) *daemon.NBD {
		n, err := daemon.DialNBD(socket, "d")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(n.Drop)
		return n
	}
	if err := dial(from).WriteAt(want, 1<<20); err != nil {
		t.Fatal(err)
	}
	source.Must(t, "blockdev-set-active", map[string]any{"active": false})
	target.Must(t, "blockdev-set-active", map[string]any{"active": true})
	got := make([]byte, len(want))
	if err := dial(to).ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, or other data than were written", err)
	}
}
