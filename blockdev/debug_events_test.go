package blockdev

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/qcow2"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestErrorsAtEvents lets a request fail at each event that a qcow2 image announces: what was acknowledged is there, and the image is sound.
func TestErrorsAtEvents(t *testing.T) {
	seen := 0
	for _, ev := range types.BlkdebugEventValues {
		if ev == types.BlkdebugEventNone {
			continue
		}
		for _, kind := range []string{"read", "write", "flush"} {
			if failAt(t, string(ev), kind) {
				seen++
			}
		}
	}
	if seen < 25 {
		t.Errorf("only %d of the rules had an effect", seen)
	}
}

// failAt tells whether a request failed.
func failAt(t *testing.T, event, kind string) (failed bool) {
	const size, block = 1 << 20, 4096
	dir := t.TempDir()
	base, file := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "a.qcow2")
	create(t, base, "", "")
	create(t, file, base, "qcow2")
	var model []byte        // nil: the image was not opened
	maybe := map[int]bool{} // blocks that a failed request may have changed
	compare := func(got []byte, where string) {
		for b := range size / block {
			if !maybe[b] && !bytes.Equal(got[b*block:(b+1)*block], model[b*block:(b+1)*block]) {
				t.Errorf("%s, %s, %s: block %d has %d, want %d", event, kind, where, b, got[b*block], model[b*block])
			}
		}
	}
	t.Cleanup(func() { // runs after the graph was closed
		if _, err := exec.LookPath("qemu-img"); err != nil {
			return
		}
		out, err := exec.Command("qemu-img", "check", file).CombinedOutput()
		if x, ok := err.(*exec.ExitError); err != nil && !(ok && x.ExitCode() == 3) {
			t.Errorf("%s, %s: %v\n%s", event, kind, err, out)
		}
		if model == nil {
			return
		}
		name := filepath.Join(dir, "a.raw")
		if out, err := exec.Command("qemu-img", "convert", "-O", "raw", file, name).CombinedOutput(); err != nil {
			t.Fatalf("%s, %s: %v\n%s", event, kind, err, out)
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		compare(got, "on disk")
	})
	m := newManager(t, Config{})
	err := add(t, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'discard': 'unmap', 'file': {'driver': 'blkdebug', 'node-name': 'd',
		'image': {'driver': 'file', 'filename': '%s'}, 'inject-error': [{'event': '%s', 'iotype': '%s', 'once': true, 'immediately': true}]}}`, file, event, kind))
	if err != nil {
		return true // the image was not even opened
	}
	n := m.Graph().Node("q")
	root := drivertest.AddRoot(t, m.Graph(), n, drivertest.Writer)
	model = make([]byte, size)
	do := func(first, k int, f func(r *blk.Req) error, then func()) {
		r, err := root.Begin(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer root.End(r)
		err = f(r)
		for b := first; b < first+k; b++ {
			if err != nil {
				maybe[b] = true
			} else {
				delete(maybe, b)
			}
		}
		if err == nil {
			then()
		} else {
			failed = true
		}
	}
	write := func(first, k int, c byte, f blk.Flags) {
		p := bytes.Repeat([]byte{c}, k*block)
		do(first, k, func(r *blk.Req) error { return root.Edge().WriteAt(r, blk.Buf(p), int64(first*block), f) }, func() { copy(model[first*block:], p) })
	}
	flush := func() { do(0, 0, func(r *blk.Req) error { return root.Edge().Flush(r) }, func() {}) }
	for round := range 3 {
		c := byte(round + 1)
		write(1, 3, c, 0)
		write(32, 16, c, blk.Compressed)
		write(64+round*16, 1, c, 0)
		flush()
		if round == 1 {
			if s, ok := n.Driver().(graph.Snapshotter); ok {
				r, err := root.Begin(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.CreateSnapshot(r, "s", started, 0); err != nil {
					failed = true
				}
				root.End(r)
			}
		}
		do(32, 16, func(r *blk.Req) error { return root.Edge().Discard(r, 32*block, 16*block) }, func() { clear(model[32*block : 48*block]) })
		do(128, 16, func(r *blk.Req) error { return root.Edge().Zero(r, 128*block, 16*block, 0) }, func() { clear(model[128*block : 144*block]) })
		for b := 0; b < size/block; b += 16 {
			p := make([]byte, 16*block)
			do(0, 0, func(r *blk.Req) error { return root.Edge().ReadAt(r, blk.Buf(p), int64(b*block), 0) }, func() {})
		}
		flush()
	}
	if q, ok := n.Driver().(*qcow2.Driver); ok && q.Ejected() {
		t.Errorf("%s, %s: the image was given up", event, kind)
	}
	got := make([]byte, size)
	for range 2 { // the rule may still be there
		var err error
		do(0, 0, func(r *blk.Req) error { err = root.Edge().ReadAt(r, blk.Buf(got), 0, 0); return err }, func() {})
		if err == nil {
			break
		}
	}
	compare(got, "read")
	flush()
	return failed
}
