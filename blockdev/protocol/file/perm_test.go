package file

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/quick"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// claims of common users.
var (
	formatWriter = perm.Claim{
		Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.ConsistentRead | perm.WriteUnchanged,
	}
	formatReader = perm.Claim{Need: perm.ConsistentRead, Share: perm.All}
	bareWriter   = perm.Claim{Need: perm.Write, Share: perm.All}
	exportWriter = perm.Claim{Need: perm.ConsistentRead | perm.Write, Share: perm.All &^ perm.Resize}
	exportReader = perm.Claim{Need: perm.ConsistentRead, Share: perm.All &^ perm.Resize}
	nobody       = perm.Claim{Share: perm.All}
	exclusive    = perm.Claim{Need: perm.ConsistentRead, Share: perm.ConsistentRead}
)

// conflict is the rule that locks stand for.
func conflict(a, b perm.Claim) bool { return a.Need&^b.Share != 0 || b.Need&^a.Share != 0 }

// Two lock sets must contradict each other exactly if their claims do.
func TestLockBytesSayWhatClaimsSay(t *testing.T) {
	err := quick.Check(func(n1, s1, n2, s2 uint8) bool {
		a := perm.Claim{Need: perm.Perm(n1) & perm.All, Share: perm.Perm(s1) & perm.All}
		b := perm.Claim{Need: perm.Perm(n2) & perm.All, Share: perm.Perm(s2) & perm.All}
		taken := map[int64]bool{}
		for _, l := range locksFor(a).bytes() {
			taken[l.off] = true
		}
		met := false
		for _, l := range locksFor(b).bytes() {
			met = met || taken[l.opposite]
		}
		return met == conflict(a, b)
	}, nil)
	if err != nil {
		t.Error(err)
	}
}

func TestLockSets(t *testing.T) {
	var got []int64
	for _, l := range locksFor(formatWriter).bytes() {
		got = append(got, l.off)
	}
	if s := fmt.Sprint(got); s != "[100 101 103 201 203]" {
		t.Errorf("bytes %s", s)
	}
	if !locksFor(nobody).empty() {
		t.Error("nobody locks")
	}
}

// change prepares and commits a claim.
func change(t *testing.T, d *disk, c perm.Claim) error {
	t.Helper()
	err := d.PermPrepare(context.Background(), c)
	if err == nil {
		d.PermCommit()
	}
	return err
}

// TestTwoNodes: two nodes of one daemon meet like two programs.
func TestTwoNodes(t *testing.T) {
	name := mustFile(t, t.TempDir(), "two", 1<<20)
	all := []perm.Claim{formatWriter, formatReader, bareWriter, nobody, exclusive}
	a, b := mustOpen(t, settings{name: name, locks: true}), mustOpen(t, settings{name: name, locks: true})
	for i, x := range all {
		for k, y := range all {
			if err := change(t, a, x); err != nil {
				t.Fatalf("%d alone: %v", i, err)
			}
			if err := change(t, b, y); (err != nil) != conflict(x, y) {
				t.Errorf("%d then %d: %v", i, k, err)
			}
			// A refused claim leaves nothing behind.
			if conflict(x, y) {
				if err := change(t, b, nobody); err != nil {
					t.Fatal(err)
				}
				if err := change(t, a, formatWriter); err != nil {
					t.Errorf("after %d was refused: %v", k, err)
				}
			}
			if err := errors.Join(change(t, a, nobody), change(t, b, nobody)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestLockTexts(t *testing.T) {
	name := mustFile(t, t.TempDir(), "two", 1<<20)
	a, b := mustOpen(t, settings{name: name, locks: true}), mustOpen(t, settings{name: name, locks: true})
	off := mustOpen(t, settings{name: name})
	for _, c := range []struct {
		have, want perm.Claim
		text       string
	}{
		{formatWriter, formatWriter, `Failed to get "write" lock`},
		{formatReader, formatWriter, ""},
		{bareWriter, formatWriter, `Failed to get shared "write" lock`},
		{formatWriter, perm.Claim{Need: perm.Resize, Share: perm.All}, `Failed to get "resize" lock`},
		// As qemu-storage-daemon words it for NBD exports and qcow2 on two nodes of one file.
		{exportWriter, exportWriter, ""},
		{exportWriter, formatWriter, `Failed to get "resize" lock`},
		{formatWriter, exportReader, `Failed to get shared "resize" lock`},
		{formatWriter, exportWriter, `Failed to get "write" lock`},
		{
			formatWriter, perm.Claim{Need: perm.ConsistentRead, Share: perm.All &^ (perm.Write | perm.Resize)},
			`Failed to get shared "write" lock`,
		},
		{perm.Claim{}, formatReader, `Failed to get "consistent read" lock`},
		{formatReader, perm.Claim{}, `Failed to get shared "consistent read" lock`},
	} {
		if err := change(t, a, c.have); err != nil {
			t.Fatal(err)
		}
		err := change(t, b, c.want)
		var hint interface{ Hint() string }
		switch {
		case c.text == "" && err != nil, c.text != "" && (err == nil || err.Error() != c.text):
			t.Errorf("%v then %v: %v", c.have, c.want, err)
		case err != nil && (!errors.As(err, &hint) || hint.Hint() != "Is another process using the image ["+name+"]?"):
			t.Errorf("no hint with %v", err)
		}
		if err := change(t, off, c.want); err != nil {
			t.Errorf("locking=off: %v", err)
		}
		_ = change(t, b, nobody)
	}
}

func TestAbortAndClose(t *testing.T) {
	name := mustFile(t, t.TempDir(), "f", 1<<20)
	a, b := mustOpen(t, settings{name: name, locks: true}), mustOpen(t, settings{name: name, locks: true})
	if err := change(t, a, formatReader); err != nil {
		t.Fatal(err)
	}
	if err := a.PermPrepare(context.Background(), formatWriter); err != nil {
		t.Fatal(err)
	}
	if err := change(t, b, bareWriter); err == nil {
		t.Error("a prepared claim does not count")
	}
	a.PermAbort()
	a.PermAbort() // does nothing
	if err := change(t, b, bareWriter); err != nil {
		t.Errorf("after an abort: %v", err)
	}
	_ = change(t, b, nobody)
	if err := change(t, a, formatWriter); err != nil {
		t.Fatal(err)
	}
	// Lowering happens at commit, not before.
	if err := a.PermPrepare(context.Background(), nobody); err != nil {
		t.Fatal(err)
	}
	if change(t, b, formatWriter) == nil {
		t.Error("unlocked before the commit")
	}
	a.PermAbort()
	a.Close()
	if err := change(t, b, formatWriter); err != nil {
		t.Errorf("after close: %v", err)
	}
}

// Under auto-read-only the file is open for writing while somebody writes; locks move along.
func TestAutoReadOnly(t *testing.T) {
	dir := t.TempDir()
	name := mustFile(t, dir, "auto", 1<<20)
	d := mustOpen(t, settings{name: name, locks: true, auto: true})
	other := mustOpen(t, settings{name: name, locks: true})
	if d.cur.Load().writable {
		t.Fatal("writable at once")
	}
	before := openFDs(t)
	for range 3 {
		if err := change(t, d, formatReader); err != nil || d.cur.Load().writable {
			t.Fatal(err)
		}
		if err := os.Rename(name, name+".moved"); err != nil { // the file counts, not its name
			t.Fatal(err)
		}
		if err := change(t, d, formatWriter); err != nil || !d.cur.Load().writable {
			t.Fatal(err)
		}
		if err := os.Rename(name+".moved", name); err != nil {
			t.Fatal(err)
		}
		if err := d.WriteAt(bg, blkBuf(512), 0, 0); err != nil {
			t.Fatal(err)
		}
		if change(t, other, bareWriter) == nil {
			t.Fatal("locks were lost on the way")
		}
	}
	if err := d.PermPrepare(context.Background(), formatReader); err != nil {
		t.Fatal(err)
	}
	d.PermAbort()
	if !d.cur.Load().writable || change(t, other, bareWriter) == nil {
		t.Error("an abort changes something")
	}
	// A lease on the old descriptor keeps it open, not its locks.
	h := d.hold()
	if err := change(t, d, formatReader); err != nil {
		t.Fatal(err)
	}
	if err := change(t, other, bareWriter); err != nil {
		t.Error(err)
	}
	h.Release()
	waitFDs(t, before)
}

// waitFDs waits until as many descriptors are open as before.
func waitFDs(t *testing.T, before int) {
	t.Helper()
	for start := time.Now(); openFDs(t) != before; runtime.Gosched() {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("%d descriptors, before %d", openFDs(t), before)
		}
	}
}

func TestConflictUnderAutoReadOnly(t *testing.T) {
	name := mustFile(t, t.TempDir(), "auto", 1<<20)
	d := mustOpen(t, settings{name: name, locks: true, auto: true})
	other := mustOpen(t, settings{name: name, locks: true})
	if err := change(t, other, formatWriter); err != nil {
		t.Fatal(err)
	}
	before := openFDs(t)
	if err := change(t, d, bareWriter); err == nil || d.cur.Load().writable {
		t.Errorf("%v", err)
	}
	if openFDs(t) != before {
		t.Error("the refused descriptor is still open")
	}
}

func openFDs(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(l)
}

// tool finds a program of QEMU or skips.
func tool(t *testing.T, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED: %s is not installed", name)
	}
	return p
}

func run(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

func TestQEMUMeetsOurLocks(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io"), tool(t, "qemu-img")
	name := filepath.Join(t.TempDir(), "a.qcow2")
	if out, err := run(qemuImg, "create", "-f", "qcow2", name, "1M"); err != nil {
		t.Fatal(out)
	}
	d := mustOpen(t, settings{name: name, locks: true})
	if err := change(t, d, formatWriter); err != nil {
		t.Fatal(err)
	}
	out, err := run(qemuIO, "-f", "qcow2", "-c", "write 0 4k", name)
	if err == nil || !strings.Contains(out, `Failed to get "write" lock`) ||
		!strings.Contains(out, "Is another process using the image ["+name+"]?") {
		t.Errorf("writer: %v %s", err, out)
	}
	out, err = run(qemuImg, "info", name)
	if err == nil || !strings.Contains(out, `Failed to get shared "write" lock`) {
		t.Errorf("reader: %v %s", err, out)
	}
	if out, err = run(qemuImg, "info", "-U", name); err != nil {
		t.Errorf("reader with -U: %s", out)
	}
	if out, err = run(qemuImg, "create", "-f", "raw", name, "1M"); err == nil || !strings.Contains(out, "lock") {
		t.Errorf("creator: %v %s", err, out)
	}
	if err := change(t, d, formatReader); err != nil {
		t.Fatal(err)
	}
	if out, err = run(qemuIO, "-f", "qcow2", "-c", "write 0 4k", name); err != nil {
		t.Errorf("writer beside a reader: %s", out)
	}
	if err := change(t, d, perm.Claim{Need: perm.ConsistentRead, Share: perm.All &^ perm.Write}); err != nil {
		t.Fatal(err)
	}
	if out, err = run(qemuIO, "-f", "qcow2", "-c", "write 0 4k", name); err == nil {
		t.Errorf("writer beside one who minds: %s", out)
	}
	d.Close()
	if out, err = run(qemuIO, "-f", "qcow2", "-c", "write 0 4k", name); err != nil {
		t.Errorf("after close: %s", out)
	}
}

func TestWeMeetQEMUsLocks(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io"), tool(t, "qemu-img")
	name := filepath.Join(t.TempDir(), "a.qcow2")
	if out, err := run(qemuImg, "create", "-f", "qcow2", name, "1M"); err != nil {
		t.Fatal(out)
	}
	holder := exec.Command(qemuIO, "-f", "qcow2", name)
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); holder.Wait() }()
	fmt.Fprintln(in, "write 0 64k")
	if _, err := out.Read(make([]byte, 512)); err != nil { // its answer: the image is open
		t.Fatal(err)
	}
	d := mustOpen(t, settings{name: name, locks: true})
	for _, c := range []struct {
		claim perm.Claim
		text  string
	}{
		{formatWriter, `Failed to get "write" lock`},
		{bareWriter, `Failed to get "write" lock`},
		{perm.Claim{Need: perm.ConsistentRead, Share: perm.ConsistentRead}, `Failed to get shared "write" lock`},
		{formatReader, ""},
		{nobody, ""},
	} {
		err := change(t, d, c.claim)
		if (err == nil) != (c.text == "") || err != nil && err.Error() != c.text {
			t.Errorf("%+v: %v", c.claim, err)
		}
	}
	err = Create(context.Background(), &types.BlockdevCreateOptionsFile{Filename: name, Size: 1 << 20}, nil)
	if err == nil || err.Error() != `Failed to get "write" lock` {
		t.Errorf("create: %v", err)
	}
	if st, _ := os.Stat(name); st.Size() < 64<<10 {
		t.Error("a refused create emptied the image")
	}
}

// TestStuckStorage: an open that the kernel holds ends for its caller with the context.
func TestStuckStorage(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	before := openFDs(t)
	ctx, cancel := context.WithCancel(context.Background())
	res := make(chan error)
	go func() {
		_, err := openDisk(ctx, settings{name: fifo, driver: "file", ro: true})
		res <- err
	}()
	select {
	case err := <-res:
		t.Fatalf("did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	cancel()
	if err := <-res; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	_, err := openDisk(context.Background(), settings{name: fifo, driver: "file"})
	if err == nil || err.Error() != "'file' driver requires '"+fifo+"' to be a regular file" {
		t.Errorf("read-write: %v", err)
	}
	waitFDs(t, before)
}
