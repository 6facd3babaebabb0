package ctl

import (
	be "encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/tests/daemon"
)

// poke writes a number of 8 bytes into a file.
func poke(t *testing.T, path string, off int64, v uint64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(be.BigEndian.AppendUint64(nil, v), off); err != nil {
		t.Fatal(err)
	}
}

// TestCheck checks and repairs files, and the images of a running daemon.
func TestCheck(t *testing.T) {
	t.Setenv("QBLOCKD", daemon.Binary(t))
	d := daemon.Start(t, tempDir(t))
	q := d.Dial(t)
	overlay(t, q, d.Dir, "a", "", 1<<20)
	image := filepath.Join(d.Dir, "a.qcow2")
	steps := func(steps []step) {
		t.Helper()
		for _, s := range steps {
			out, said, code := ctl(t, d, "", strings.Fields(s.words)...)
			if code != s.code || !strings.Contains(out+said, s.said) {
				t.Errorf("%s: exit %d, %q, %q; expected %d and %q", s.words, code, out, said, s.code, s.said)
			}
		}
	}
	steps([]step{
		{"check --node a", 0, "the image is sound"},
		{"check --node a -r all", 0, "the image is sound"},
		{"check -r all " + image, 1, "Failed to get"}, // the daemon has it
		{"check --node a-f", 63, "This image format does not support checks"},
		{"check --node nope", 1, "node-name='nope'"},
		{"check", 2, "a FILE, or --node"},
		{"check --node a " + image, 2, "a FILE, or --node"},
		{"check -r some " + image, 2, "-r leaks or -r all"},
		{"check --output xml " + image, 2, "--output"},
		{"check /nowhere", 1, "no such file"},
		{"jobs", 0, "no jobs"},
	})
	q.Must(t, "blockdev-del", map[string]any{"node-name": "a"})
	const refblock, incompat = 2 << 16, 72
	poke(t, image, refblock+16, 0x0001000100000000) // clusters 8 and 9, which nobody uses
	poke(t, image, incompat, 2)
	var found struct{ Leaks, LeaksFixed int }
	out, _, code := ctl(t, d, "", "check", "--output", "json", image)
	if err := json.Unmarshal([]byte(out), &found); err != nil || code != 3 || found.Leaks != 2 {
		t.Errorf("exit %d, %v\n%s", code, err, out)
	}
	q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "r", map[string]any{"read-only": true, "file": map[string]any{
		"driver": "file", "filename": image, "read-only": true}}))
	steps([]step{
		{"check --node r", 3, "leaked clusters: 2"},
		{"check --node r -r leaks", 1, "Block node is read-only"},
	})
	q.Must(t, "blockdev-del", map[string]any{"node-name": "r"})
	steps([]step{
		{"check -r leaks " + image, 0, "repaired: 0 corruptions, 2 leaked clusters"},
		{"check " + image, 0, "the image is sound"},
	})
	steps([]step{
		{"amend -o refcount_bits=64,lazy_refcounts=on " + image, 0, ""},
		{"amend -o compat=0.10 " + image, 1, "compat=0.10 requires refcount_bits=16"},
		{"amend -o compat=0.9 " + image, 2, "Unknown compatibility level 0.9"},
		{"amend -o refcount_bits=16,compat=0.10,lazy_refcounts=off " + image, 0, ""},
		{"amend -o cluster_size=4096 " + image, 2, "'cluster_size' cannot be changed"},
		{"check " + image, 0, "the image is sound"},
	})
	// It is not marked as corrupt any more.
	q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "a", map[string]any{"file": daemon.File(image)}))
	steps([]step{{"amend -o compat=1.1,refcount_bits=8 --node a", 0, ""}})
	if out := must(t, d, "query-named-block-nodes", "flat=true"); !strings.Contains(out, `"refcount-bits": 8`) {
		t.Errorf("the node does not show it: %s", out)
	}
	d.Stop(t)
}

type step struct {
	words string
	code  int
	said  string
}
