package blkdebug

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConfig: files with rules are read as QEMU reads them.
func TestConfig(t *testing.T) {
	for text, want := range map[string]string{
		"once = \"yes\"":                 "",
		"once = \"y\"\nid = \"x\"":       "",
		"once = \"true\" # from here":    "",
		"immediately = \"no\"":           "",
		"immediately = \"1\"":            "Parameter 'immediately' expects 'on' or 'off'",
		"errno = 5":                      "parse error",
		"errno = \"5":                    "parse error",
		"[set-state \"a\"] x":            "Missing event name for rule",
		"[set-state ] x\nevent = \"no\"": "invalid parameter value: no",
		strings.Repeat("#\n", 1<<20):     "File too large",
	} {
		name := filepath.Join(t.TempDir(), "c")
		text = "[inject-error]\nevent = \"none\"\n" + text
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		inject, _, err := readConfig(name)
		switch {
		case want == "" && (err != nil || len(inject) != 1):
			t.Errorf("%.60q: %d rules, error %v", text, len(inject), err)
		case want == "" && strings.Contains(text, "once") != (inject[0].Once != nil && *inject[0].Once):
			t.Errorf("%q: once is %v", text, inject[0].Once)
		case want != "" && (err == nil || !strings.HasSuffix(err.Error(), want)):
			t.Errorf("%.60q: error %v, want %s", text, err, want)
		}
	}
}
