package main

import (
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"qblockd/blockdev"
)

func TestSetPolicy(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	writeTestFile(t, dir+"/file")
	var p blockdev.Policy
	for _, c := range []struct {
		arg  string
		want blockdev.Policy
	}{
		{"devices=on,max-chain=7", blockdev.Policy{Devices: true, MaxChain: 7}},
		{"references=on,max-chain=0", blockdev.Policy{Devices: true, References: true, MaxChain: -1}},
		{"devices=off,roots=" + dir + "/link:/", blockdev.Policy{References: true, MaxChain: -1, Roots: []string{dir, "/"}}},
	} {
		if err := setPolicy(&p, c.arg); err != nil || !reflect.DeepEqual(p, c.want) {
			t.Errorf("%s: %v, %+v", c.arg, err, p)
		}
	}
	before := p
	for arg, want := range map[string]string{
		"devices=maybe":             "Parameter 'devices' expects 'on' or 'off'",
		"max-chain=10001":           "Parameter 'max-chain' expects a value from 0 to 10000",
		"max-chain=-1":              "Parameter 'max-chain' expects a number",
		"roots=":                    "Parameter 'roots' expects folders: '' is not an absolute path",
		"roots=images":              "Parameter 'roots' expects folders: 'images' is not an absolute path",
		"roots=" + dir + "/missing": "Parameter 'roots' expects folders: lstat " + dir + "/missing: no such file or directory",
		"roots=" + dir + "/file":    "Parameter 'roots' expects folders: '" + dir + "/file' is not a folder",
		"writable=on":               "Invalid parameter 'writable'",
		"id=a":                      "Invalid parameter 'id'",
	} {
		if err := setPolicy(&p, arg); err == nil || err.Error() != want || !reflect.DeepEqual(p, before) {
			t.Errorf("%s: %v", arg, err)
		}
	}
}

func writeTestFile(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestPolicyIsDocumented: the table of docs/image-policy.md is what --image-policy help says.
func TestPolicyIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/image-policy.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range policyKeys {
		if row := fmt.Sprintf("| `%s` | %s | %s |\n", k.name, k.def, k.text); !strings.Contains(string(doc), row) {
			t.Errorf("docs/image-policy.md lacks\n%s", row)
		}
		if !strings.Contains(policyText(), "  "+k.name+"="+k.def+" ") {
			t.Errorf("--image-policy help lacks %s", k.name)
		}
	}
	if n := strings.Count(string(doc), "\n| `"); n != len(policyKeys) {
		t.Errorf("docs/image-policy.md has %d keys of %d", n, len(policyKeys))
	}
}
