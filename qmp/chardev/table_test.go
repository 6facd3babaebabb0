package chardev

import (
	"fmt"
	"testing"
)

// TestDuplicateOnCommandLine: a second device with the label of another is refused in QEMU's words,
// which are others for two sockets.
func TestDuplicateOnCommandLine(t *testing.T) {
	null := `{"type":"null","data":{}}`
	addr := fmt.Sprintf(`{"type":"unix","data":{"path":"%s/s"}}`, t.TempDir())
	socket := `{"type":"socket","data":{"wait":false,"addr":` + addr + `}}`
	property := "attempt to add duplicate property 'n' to object (type 'container')"
	for _, c := range []struct{ first, second, want string }{
		{null, null, property},
		{null, socket, property},
		{socket, null, property},
		{socket, socket, "duplicate yank instance"},
	} {
		tab := newTestTable(t)
		if _, err := tab.Open(t.Context(), "n", backend(t, "%s", c.first), CommandLine); err != nil {
			t.Fatal(err)
		}
		_, err := tab.Open(t.Context(), "n", backend(t, "%s", c.second), CommandLine)
		if err == nil || err.Error() != c.want {
			t.Errorf("%s after %s: %v, want %s", c.second, c.first, err, c.want)
		}
		tab.Close()
	}
}
