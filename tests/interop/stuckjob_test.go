package interop

import (
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// TestStuckJob ends the daemon while a job waits for storage that does not answer: the other disks
// are flushed and closed in time all the same, and the job's late end is no crash.
func TestStuckJob(t *testing.T) {
	dir := t.TempDir()
	image(t, dir)
	f, path := mountDisk(t)
	sh(t, dir, "qemu-img create -q -f qcow2 -u -b '%s' -F raw top.qcow2 1M", path)
	d := daemon.Start(t, dir,
		"--blockdev", "qcow2,node-name=other,file.driver=file,file.filename=other.qcow2",
		"--export", "nbd,id=other,node-name=other,writable=on",
		"--blockdev", "raw,node-name=slow,read-only=on,file.driver=file,file.filename="+path,
		"--blockdev", "qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=slow")
	q := d.Dial(t)
	f.hold.Store(true)
	q.Must(t, "block-stream", map[string]any{"device": "top", "job-id": "j"})
	<-f.held
	c, err := d.DialNBD("other")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt([]byte("flushed at the end"), 0); err != nil {
		t.Fatal(err)
	}
	ends(t, d)
	if out := sh(t, dir, "qemu-img check -q -U other.qcow2; qemu-img convert -U -O raw other.qcow2 raw; head -c 18 raw"); out != "flushed at the end" {
		t.Errorf("the other disk holds %q", out)
	}
	close(f.release)
	if !d.Ended(5 * time.Second) {
		t.Error("the process is still there after its storage has answered")
	}
	sh(t, dir, "qemu-img check -q -U top.qcow2 || [ $? = 3 ]") // leaks are allowed
}
