package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "qblockd"

// pkg is what go list tells of a package.
type pkg struct {
	ImportPath, Dir, Doc               string
	GoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// name is the import path below the module; "" is the module itself.
func (p *pkg) name() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

// list runs go list -json on the patterns.
func list(t *testing.T, patterns ...string) []*pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json"}, patterns...)...)
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.Bytes())
	}
	var all []*pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		p := &pkg{}
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	for _, p := range list(t, "./...") {
		from := p.name()
		for _, imp := range p.Imports {
			if why := forbidden(from, imp); why != "" {
				t.Errorf("%s imports %s: %s", from, imp, why)
			}
		}
		for _, imp := range slices.Concat(p.TestImports, p.XTestImports) {
			if why := forbiddenInTests(from, imp); why != "" {
				t.Errorf("the tests of %s import %s: %s", from, imp, why)
			}
		}
	}
}

// forbidden tells why the package from may not import imp; "" if it may.
func forbidden(from, imp string) string {
	to, ours := strings.CutPrefix(imp, module+"/")
	switch {
	case standard(imp):
		return ""
	case !ours:
		return foreign(from, imp, false)
	case matches(testOnly, to) && !matches(testOnly, from):
		return "it is for tests only"
	case leaves[from] != nil || isLeaf(from):
		if matches(leaves[from], to) {
			return ""
		}
		return "its importer is a leaf"
	case matches(anyone, to):
		return ""
	}
	for _, r := range rules {
		if match(r.from, from) {
			if matches(r.to, to) {
				return ""
			}
			return "not among " + strings.Join(r.to, ", ")
		}
	}
	return "there is no rule for " + from
}

func isLeaf(name string) bool { _, ok := leaves[name]; return ok }

// forbiddenInTests is forbidden for test files: they may use what the package may, and all of ours
// but commands and other tests' packages.
func forbiddenInTests(from, imp string) string {
	to, ours := strings.CutPrefix(imp, module+"/")
	switch {
	case standard(imp):
		return ""
	case !ours:
		return foreign(from, imp, true)
	case match("cmd/...", to) && forbidden(from, imp) == "":
		return ""
	case match("cmd/...", to), match("tests/...", to) && !match("tests/...", from):
		return "nobody imports commands, and only tests/... what is there"
	}
	return ""
}

func foreign(from, imp string, inTests bool) string {
	for _, m := range thirdParty {
		if imp != m.module && !strings.HasPrefix(imp, m.module+"/") {
			continue
		}
		if matches(m.code, from) || inTests && matches(m.tests, from) || matches(testOnly, from) && matches(m.tests, from) {
			return ""
		}
		return m.module + " has its place elsewhere"
	}
	return "not a module we use"
}

// standard tells whether an import path is of the standard library.
func standard(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return first != module && !strings.Contains(first, ".")
}

func matches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, name) })
}

// match tells whether name fits pattern; see rules.
func match(pattern, name string) bool {
	switch {
	case pattern == "...":
		return true
	case strings.HasSuffix(pattern, "/..."):
		base := strings.TrimSuffix(pattern, "/...")
		return name == base || strings.HasPrefix(name, base+"/")
	case strings.HasSuffix(pattern, "/*"):
		rest, ok := strings.CutPrefix(name, strings.TrimSuffix(pattern, "*"))
		return ok && rest != "" && !strings.Contains(rest, "/")
	}
	return pattern == name
}

// TestRules: edges that must not pass do not, and one that must does.
func TestRules(t *testing.T) {
	if forbidden("graph", module+"/blockdev") == "" || forbidden("graph/perm", module+"/graph/blk") == "" ||
		forbidden("blockdev/format/raw", module+"/blockdev/format/qcow2") == "" || forbidden("jobs/stream", module+"/jobs/create") == "" ||
		forbidden("graph", "golang.org/x/sys/unix") == "" || forbidden("qmp", module+"/blockdev/drivertest") == "" {
		t.Error("an edge passes that must not")
	}
	if why := forbidden("blockdev/export/nbd", module+"/blockdev/nbdwire"); why != "" {
		t.Error(why)
	}
}

func TestDaemonLinks(t *testing.T) {
	p := list(t, "./cmd/qblockd")[0]
	for _, no := range notLinked {
		if slices.Contains(p.Deps, no) {
			t.Errorf("qblockd contains %s: go list -deps -f '{{.ImportPath}}: {{.Imports}}' ./cmd/qblockd shows through whom", no)
		}
	}
}
