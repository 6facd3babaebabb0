package load

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// A bug of ours fails what it is found in; the daemon goes on serving everybody, unless the state
// of everything is in doubt.
func TestDaemonSurvivesPanics(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "qblockd")
	if out, err := exec.Command("go", "build", "-tags", "testpanic", "-o", bin, "qblockd/cmd/qblockd").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	d := daemon.StartBinary(t, bin, dir)
	q, other := d.Dial(t), d.Dial(t)
	q.Must(t, "blockdev-add", daemon.Blockdev("null-co", "n", map[string]any{"size": 1 << 20, "read-zeroes": true}))
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n"})
	guest, err := d.DialNBD("n")
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Drop()
	for where, want := range map[string]string{"command": "Internal error in command 'x-test-panic'", "background": "Internal error in work in the background"} {
		if _, err := q.Do("x-test-panic", map[string]any{"where": where}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", where, err)
		}
		for _, c := range []*daemon.QMP{q, other} {
			var nodes []struct {
				NodeName string `json:"node-name"`
			}
			if err := json.Unmarshal(c.Must(t, "query-named-block-nodes", nil), &nodes); err != nil || len(nodes) != 1 {
				t.Errorf("%v, %v", nodes, err)
			}
		}
		if err := guest.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("a guest: %v", err)
		}
	}
	_ = q.Send("x-test-panic", map[string]any{"where": "everything"})
	if !d.Ended(20*time.Second) || d.Cmd.ProcessState.ExitCode() != 2 {
		t.Errorf("it does not end on purpose: %v", d.Cmd.ProcessState)
	}
	log := d.Stderr.String()
	for _, want := range []string{"internal error, contained", "a bug in a command", "a bug in the background", "bugs_on.go", "the daemon ends"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in the log: %s", want, log)
		}
	}
}
