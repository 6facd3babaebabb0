package arch

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// root is the module's folder, seen from this package.
const root = "../.."

var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func TestPackagesAndFiles(t *testing.T) {
	unused := map[string]bool{}
	for name := range longFiles {
		unused[name] = true
	}
	for _, p := range list(t, "./...") {
		// go list has no Doc for packages that consist of tests.
		documented := p.Doc != ""
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			text, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			file := strings.TrimPrefix(p.name()+"/"+name, "/")
			f, err := parser.ParseFile(token.NewFileSet(), file, text, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || f.Doc.Text() != ""
			checkInit(t, file, f)
			if generated.Match(text) {
				continue
			}
			limit := maxLines
			if n, ok := longFiles[file]; ok {
				limit = n
				delete(unused, file)
				if bytes.Count(text, []byte("\n")) <= maxLines {
					t.Errorf("%s is short again: take it off longFiles", file)
				}
			}
			if n := bytes.Count(text, []byte("\n")); n > limit {
				t.Errorf("%s has %d lines, more than %d: split it", file, n, limit)
			}
		}
		if !documented {
			t.Errorf("package %s has no package comment", p.ImportPath)
		}
	}
	for name := range unused {
		t.Errorf("longFiles lists %s, which is not there", name)
	}
}

// checkInit refuses init functions: work at start belongs into the functions that need its result.
func checkInit(t *testing.T, file string, f *ast.File) {
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
			t.Errorf("%s has an init function", file)
		}
	}
}

var initLine = regexp.MustCompile(`(?m)^init (\S+) @\S+ ms, (\S+) ms clock`)

// TestInit starts the daemon a few times and reads what each package's initialization took.
func TestInit(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "qblockd")
	build := exec.Command("go", "build", "-o", bin, "./cmd/qblockd")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	least := map[string]float64{} // the best of all runs: the machine has other things to do as well
	for range 5 {
		cmd := exec.Command(bin, "--version")
		cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1")
		cmd.WaitDelay = 10 * time.Second
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, m := range initLine.FindAllSubmatch(out, -1) {
			ms, err := strconv.ParseFloat(string(m[2]), 64)
			if err != nil {
				t.Fatal(err)
			}
			if old, ok := least[string(m[1])]; !ok || ms < old {
				least[string(m[1])] = ms
			}
		}
	}
	if len(least) == 0 {
		t.Fatal("the runtime traced no package")
	}
	for name, ms := range least {
		if ms > maxInit && (name == "main" || strings.HasPrefix(name, module+"/")) {
			t.Errorf("package %s takes %v ms at start, more than %v", name, ms, maxInit)
		}
		if ms > maxInit {
			t.Logf("%s: %v ms at start", name, ms)
		}
	}
}
