package conv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qblockd/tests/conv/player"
)

// TestPlayerAgreesWithOracle plays some conversations against the real daemon: the player must come
// to what was recorded there.
func TestPlayerAgreesWithOracle(t *testing.T) {
	server, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		t.Skip("SKIPPED: qemu-storage-daemon is not installed")
	}
	pattern := os.Getenv("CONV_ORACLE")
	if pattern == "" {
		pattern = "wire/[a-n]*"
	}
	files, _ := filepath.Glob("corpus/" + pattern + ".qmp")
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			want, err := os.ReadFile(strings.TrimSuffix(file, ".qmp") + ".golden")
			if err != nil {
				t.Fatal(err)
			}
			// About one start of the real daemon in 300 answers nothing at all.
			var diff string
			for range 3 {
				got, err := player.Play(server, file)
				if err != nil {
					t.Fatal(err)
				}
				if diff = cmp.Diff(lines(string(want)), lines(got.String())); diff == "" {
					return
				}
			}
			t.Errorf("-recorded +played:\n%s", diff)
		})
	}
}
