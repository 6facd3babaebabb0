// Package conv plays the recorded conversations against qblockd. What they hold was answered by the real
// qemu-storage-daemon; where the answers still differ, expected.txt says so, and a conversation that has become
// equal must leave that list.
package conv

import (
	"bufio"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qblockd/tests/conv/player"
)

var update = flag.Bool("update", false, "record qblockd's answers as the goldens of its own conversations (tests/conv/own)")

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
				check(t, server, file, expected[strings.TrimPrefix(name, "corpus/")], dir == "own")
			})
		}
	}
}

func check(t *testing.T, server, file, expected string, own bool) {
	golden := strings.TrimSuffix(file, ".qmp") + ".golden"
	got, err := player.Play(server, file)
	if err != nil {
		t.Fatal(err)
	}
	if *update && own {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	diff := cmp.Diff(lines(string(want)), lines(got.String()))
	switch {
	case diff == "" && expected != "":
		t.Errorf("equal now: take it off expected.txt (%s)", expected)
	case diff != "" && expected == "":
		t.Errorf("differs from the recorded answers (-want +got):\n%s", diff)
	}
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

// readExpected reads expected.txt: a name and the reason on each line.
func readExpected(t *testing.T) map[string]string {
	t.Helper()
	f, err := os.Open("expected.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, " ")
		if !ok {
			t.Fatalf("expected.txt: %q gives no reason", line)
		}
		out[name] = strings.TrimSpace(reason)
	}
	return out
}
