package storm

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

var (
	subject = flag.String("storm.binary", "", "daemon to try; empty: this tree's, with and without the race detector")
	length  = flag.Duration("storm.time", 0, "how long all storms take; 0: a short while")
	clients = flag.Int("storm.clients", 6, "clients of a storm")
	seed    = flag.Uint64("storm.seed", 1, "of the first storm")
	only    = flag.String("storm.only", "", "commands to send, as a regular expression: what a storm finds with all of them is found sooner")
	keep    = flag.String("storm.keep", os.TempDir(), "where the logs of storms that fail go")
)

// oneStorm is how long a storm blows: short ones, as a new one begins with other images.
const oneStorm = 10 * time.Second

// Every command of the schema is one that clients of a storm send, or is left out for a reason.
func TestAllCommands(t *testing.T) {
	d := daemon.Start(t, t.TempDir())
	var l []struct{ Name string }
	if err := json.Unmarshal(d.Dial(t).Must(t, "query-commands", nil), &l); err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, c := range l {
		have[c.Name] = true
		if _, sent := generators[c.Name]; sent == (leftOut[c.Name] != "") {
			t.Errorf("%s must be sent by storms or left out for a reason", c.Name)
		}
	}
	for name := range generators {
		if !have[name] {
			t.Errorf("there is no command %s", name)
		}
	}
}

func TestStorm(t *testing.T) {
	if testing.Short() {
		t.Skip("takes its time")
	}
	binaries := []string{*subject}
	if *subject == "" {
		binaries = []string{racing(t), daemon.Binary(t)}
	}
	c := config{seed: *seed, clients: *clients, time: oneStorm, limit: time.Minute, keep: *keep,
		only: regexp.MustCompile(*only)}
	commands, storms := 0, 0
	for begin := time.Now(); storms < 2 || time.Since(begin) < *length; storms++ {
		c.binary = binaries[storms%len(binaries)]
		if !t.Run("", func(t *testing.T) { commands += storm(t, c) }) {
			break
		}
		c.seed++
	}
	t.Logf("%d storms, %d commands", storms, commands)
}

// racing builds a daemon with the race detector and all checks.
func racing(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "qblockd")
	if out, err := exec.Command("go", "build", "-race", "-tags", "invariants", "-o", bin, "qblockd/cmd/qblockd").CombinedOutput(); err != nil {
		t.Skipf("no race detector here: %s", out)
	}
	return bin
}
