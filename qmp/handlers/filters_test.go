package handlers

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"qblockd/events"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// A copy of the top layer of a disk ends at what lies below the backing link, also where the disk
// is reached by filters, or has some on its backing file: no more is copied than without them, and
// a new target names what lies below.
func TestTopThroughFilters(t *testing.T) {
	ready := make(readySink, 1)
	w := newWorldSink(t, ready)
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	if err := os.WriteFile(path("base"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	add := func(n, backing string) {
		w.ok("blockdev-add", fmt.Sprintf(`{'driver': 'qcow2', 'node-name': '%s', 'backing': %s, 'file': {'driver': 'file', 'filename': '%s'}}`, n, backing, path(n)))
	}
	w.image(path("over"))
	w.ok("blockdev-add", `{'driver': 'raw', 'node-name': 'base', 'file': {'driver': 'file', 'filename': '`+path("base")+`'}}`)
	w.ok("blockdev-add", `{'driver': 'copy-on-read', 'node-name': 'below', 'file': 'base'}`)
	add("over", "'below'")
	w.ok("blockdev-add", `{'driver': 'copy-on-read', 'node-name': 'inner', 'file': 'over'}`)
	w.ok("blockdev-add", `{'driver': 'copy-on-read', 'node-name': 'outer', 'file': 'inner'}`)
	write(t, w.g, "outer", 512, 512)
	for _, n := range []string{"over", "inner", "outer"} {
		if got := graph.Now.BackingChainNext(w.g.Node(n)); got != w.g.Node("base") {
			t.Errorf("below %s is %s", n, got.Name())
		}
	}

	w.image(path("copy"))
	add("copy", "null")
	w.ok("blockdev-mirror", `{'job-id': 'j', 'device': 'outer', 'target': 'copy', 'sync': 'top', 'granularity': 65536}`)
	<-ready
	if n := w.jobs.Query()[0].TotalProgress; n != 65536 {
		t.Errorf("the mirror copied %d bytes of an overlay that holds one cluster", n)
	}
	j := w.jobs.Get("j")
	w.ok("block-job-cancel", `{'device': 'j'}`)
	<-j.Finished()

	w.ok("drive-backup", `{'job-id': 'b', 'device': 'outer', 'target': '`+path("new")+`', 'format': 'qcow2', 'sync': 'top', 'auto-dismiss': false}`)
	j = w.jobs.Get("b")
	<-j.Finished()
	if err := j.Err(); err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile(path("new"))
	if err != nil {
		t.Fatal(err)
	}
	at := binary.BigEndian.Uint64(header[8:])
	if got := string(header[at : at+uint64(binary.BigEndian.Uint32(header[16:]))]); got != path("base") {
		t.Errorf("the backup has %q as its backing file", got)
	}
}

// readySink gets a value for each job that is ready.
type readySink chan struct{}

func (s readySink) Emit(e events.Event) {
	if c, ok := e.(types.JobStatusChangeEvent); ok && c.Status == types.JobStatusReady {
		s <- struct{}{}
	}
}

// write writes ones through a node.
func write(t *testing.T, g *graph.Graph, node string, off, n int64) {
	t.Helper()
	tx := g.Begin(context.Background())
	defer tx.Abort()
	spec := graph.RootSpec{EdgeName: "root", Claim: perm.Claim{Need: perm.Write, Share: perm.All}}
	root, err := tx.AttachRoot(spec, g.Node(node))
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = 1
	}
	if err := root.Edge().WriteAt(r, blk.Buf(b), off, 0); err != nil {
		t.Error(err)
	}
	root.End(r)
	if err := g.CloseRoot(context.Background(), root); err != nil {
		t.Fatal(err)
	}
}

// A target that can have no backing file cannot show the source below what guests change.
func TestDriveBackupOverSource(t *testing.T) {
	w := newWorldSink(t, make(readySink, 1))
	path := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'source', 'size': 65536}`)
	for _, sync := range []string{"none", "full"} {
		err := w.try(t.Context(), "drive-backup", `{'job-id': 'j', 'device': 'source', 'target': '`+path+`', 'mode': 'existing', 'format': 'raw', 'sync': '`+sync+`', 'auto-dismiss': false}`)
		if sync == "none" && (err == nil || !strings.HasSuffix(err.Error(), "does not support backing files")) || sync == "full" && err != nil {
			t.Errorf("sync %s: %v", sync, err)
		}
	}
	<-w.jobs.Get("j").Finished()
}

// A drive-backup that cannot flush its target fails: its node goes with the job.
func TestDriveBackupFlushes(t *testing.T) {
	w := newWorldSink(t, make(readySink, 1))
	path := filepath.Join(t.TempDir(), "target")
	if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'source', 'size': 65536, 'read-zeroes': true}`)
	target := `json:{"driver": "blkdebug", "inject-error": [{"event": "none", "iotype": "flush"}], "image": {"driver": "file", "filename": "` + path + `"}}`
	w.ok("drive-backup", `{'job-id': 'j', 'device': 'source', 'target': '`+target+`', 'mode': 'existing', 'sync': 'full', 'auto-dismiss': false}`)
	j := w.jobs.Get("j")
	if <-j.Finished(); !errors.Is(j.Err(), syscall.EIO) {
		t.Errorf("outcome: %v", j.Err())
	}
}
