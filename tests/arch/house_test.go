package arch

import (
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
			checkFields(t, file, f)
		}
		if !documented {
			t.Errorf("package %s has no package comment", p.ImportPath)
		}
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

// checkFields has structs with +checklocks annotations declare one field a line: checklocks takes
// the third line for the third field.
func checkFields(t *testing.T, file string, f *ast.File) {
	ast.Inspect(f, func(n ast.Node) bool {
		s, ok := n.(*ast.StructType)
		if !ok {
			return true
		}
		annotated, several := false, ""
		for _, field := range s.Fields.List {
			for _, g := range []*ast.CommentGroup{field.Doc, field.Comment} {
				annotated = annotated || g != nil && slices.ContainsFunc(g.List, func(c *ast.Comment) bool {
					return strings.HasPrefix(c.Text, "// +checklocks:")
				})
			}
			if len(field.Names) > 1 {
				several = field.Names[0].Name
			}
		}
		if annotated && several != "" {
			t.Errorf("%s: %s shares its line with another field: checklocks cannot count then", file, several)
		}
		return true
	})
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
