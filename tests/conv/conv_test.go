// Package conv plays the recorded conversations against qblockd. What they hold was answered by the
// real qemu-storage-daemon; where the answers cannot be equal yet, or differ on purpose,
// expected.txt says so. That list can only shrink: a conversation that has become equal, or whose
// needs are met, must leave it.
package conv

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qblockd/tests/conv/player"
)

var (
	update = flag.Bool("update", false, "record qblockd's answers to its own conversations (own), and where it differs on purpose (differs)")
	all    = flag.Bool("conv.all", os.Getenv("CONV_ALL") != "", "play also what needs features that are not there; minutes of waiting in vain")
)

func TestConversations(t *testing.T) {
	for _, tool := range []string{"qemu-img", "qemu-io", "nbdinfo", "jq", "bash", "python3"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: the conversations need %s, which is not installed", tool)
		}
	}
	server := build(t)
	expected := readExpected(t)
	for _, dir := range []string{"corpus", "own"} {
		files, err := filepath.Glob(dir + "/*/*.qmp")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			name := strings.TrimSuffix(file, ".qmp")
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				if strings.HasPrefix(name, "own/device/") && exec.Command("losetup", "-f").Run() != nil {
					t.Skip("SKIPPED: there are no loop devices")
				}
				check(t, server, file, expected[strings.TrimPrefix(name, "corpus/")])
			})
		}
	}
}

func check(t *testing.T, server, file string, e *expectation) {
	golden := strings.TrimSuffix(file, ".qmp") + ".golden"
	waits := e != nil && !e.differs
	if waits {
		if missing := e.missing(t); len(missing) == 0 {
			t.Error("all that it needs is there: take it off expected.txt")
			waits = false
		} else if !*all {
			t.Skipf("needs %s", strings.Join(missing, ", "))
		}
	}
	got, err := player.Play(server, file)
	if err != nil {
		t.Fatal(err)
	}
	if *update && (e != nil && e.differs || strings.HasPrefix(file, "own")) {
		if e != nil {
			golden = strings.Replace(golden, "corpus", "differs", 1)
		}
		if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	diff := compare(t, golden, got.String())
	switch {
	case e == nil || !waits && !e.differs:
		if diff != "" {
			t.Errorf("differs from the recorded answers (-want +got):\n%s", diff)
		}
	case diff == "":
		t.Error("equal now: take it off expected.txt")
	case e.differs:
		ours := strings.Replace(golden, "corpus", "differs", 1)
		if diff := compare(t, ours, got.String()); diff != "" {
			t.Errorf("differs from QEMU on purpose (%s), but now in another way than recorded (-want +got):\n%s", e.reason, diff)
		}
	}
}

// compare returns how got differs from what is recorded in the file golden; "" if it does not.
func compare(t *testing.T, golden, got string) string {
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	return cmp.Diff(lines(string(want)), lines(got))
}

func lines(s string) []string { return strings.Split(s, "\n") }

// build makes the daemon under the name that the conversations know nothing of.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "qblockd")
	out, err := exec.Command("go", "build", "-o", bin, "qblockd/cmd/qblockd").CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}
