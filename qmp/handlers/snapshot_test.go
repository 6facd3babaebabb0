package handlers

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// alike is a node "n" with four snapshots, (1, a) (1, b) (2, a) (2, b), as an image may say them to
// be.
func alike(t *testing.T) *world {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "n")
	w.image(file)
	w.ok("blockdev-add", `{'driver': 'qcow2', 'node-name': 'n', 'file': {'driver': 'file', 'filename': '`+file+`'}}`)
	for i := range 4 {
		w.ok("blockdev-snapshot-internal-sync", fmt.Sprintf(`{'device': 'n', 'name': 'name%d'}`, i))
	}
	w.ok("blockdev-del", `{'node-name': 'n'}`)
	img, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	table := img[binary.BigEndian.Uint64(img[64:]):]
	for i := range 4 {
		from := []byte(fmt.Sprintf("%dname%d", i+1, i))
		at := bytes.Index(table, from)
		copy(table[at:], fmt.Sprintf("%d%s", i/2+1, []string{"aaaaa", "bbbbb"}[i%2]))
	}
	if err := os.WriteFile(file, img, 0o600); err != nil {
		t.Fatal(err)
	}
	w.ok("blockdev-add", `{'driver': 'qcow2', 'node-name': 'n', 'file': {'driver': 'file', 'filename': '`+file+`'}}`)
	return w
}

// snapshots lists ID and name of all of them.
func (w *world) snapshots() string {
	var l []string
	for _, m := range regexp.MustCompile(`"name": ?"([^"]*)"[^}]*"id": ?"([^"]*)"|"id": ?"([^"]*)"[^}]*"name": ?"([^"]*)"`).FindAllStringSubmatch(w.say(w.t, "query-named-block-nodes", `{}`), -1) {
		l = append(l, m[2]+m[3]+(m[1] + m[4])[:1])
	}
	return strings.Join(l, " ")
}

// Of internal snapshots with the same ID, or the same name, the first one goes that has what was
// asked for, the reply shows that one, and what a transaction undoes is what it has made.
func TestSnapshotsWithTheSameID(t *testing.T) {
	for _, c := range []struct{ args, goes, left string }{
		{`'id': '1', 'name': 'bbbbb'`, "1b", "1a 2a 2b"},
		{`'name': 'aaaaa'`, "1a", "1b 2a 2b"},
		{`'name': 'bbbbb'`, "1b", "1a 2a 2b"},
		{`'id': '2'`, "2a", "1a 1b 2b"},
		{`'id': '2', 'name': 'bbbbb'`, "2b", "1a 1b 2a"},
	} {
		w := alike(t)
		got := w.say(t, "blockdev-snapshot-delete-internal-sync", `{'device': 'n', `+c.args+`}`)
		name := strings.Repeat(c.goes[1:], 5)
		if !strings.Contains(got, `"id": "`+c.goes[:1]+`"`) || !strings.Contains(got, `"name": "`+name+`"`) {
			t.Errorf("%s: the reply is %s", c.args, got)
		}
		if l := w.snapshots(); l != c.left {
			t.Errorf("%s: %s are left, want %s", c.args, l, c.left)
		}
	}
	w := alike(t)
	if got := w.say(t, "blockdev-snapshot-delete-internal-sync", `{'device': 'n', 'id': '3', 'name': 'aaaaa'}`); got != "GenericError: Snapshot with id '3' and name 'aaaaa' does not exist on device 'n'" {
		t.Error(got)
	}
	w.say(t, "transaction", `{'actions': [{'type': 'blockdev-snapshot-internal-sync', 'data': {'device': 'n', 'name': 'ccccc'}}, {'type': 'abort', 'data': {}}]}`)
	if l := w.snapshots(); l != "1a 1b 2a 2b" {
		t.Errorf("after a transaction that failed: %s", l)
	}
}
