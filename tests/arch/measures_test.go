package arch

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// measures are the sizes of the code, with what is the most of each.
var measures = []struct {
	name, of string
	most     int
}{
	{"function", "lines of a function", 70},
	{"file", "lines of a file", 500},
	{"methods", "methods of a type", 40},
	{"comment", "columns of a line of comment", 100},
	{"code", "columns of a line of code, not counting strings: who looks for a text finds it in one piece", 120},
}

// exceptions lists what is larger: measure, how large, what. Of comment and code it is how many
// lines of the package are. Nothing is added to it; "go test ./tests/arch -run TestMeasures
// -update" writes it anew.
const exceptions = "exceptions.txt"

var update = flag.Bool("update", false, "TestMeasures: write exceptions.txt anew")

func TestMeasures(t *testing.T) {
	found := map[string]int{}
	for _, p := range list(t, "./...") {
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			text, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if !generated.Match(text) {
				measureFile(t, p.name(), name, text, found)
			}
		}
	}
	for _, m := range measures {
		for what, n := range found {
			if strings.HasPrefix(what, m.name+" ") && n <= m.most && m.name != "comment" && m.name != "code" {
				delete(found, what)
			}
		}
	}
	if *update {
		var l []string
		for what, n := range found {
			kind, what, _ := strings.Cut(what, " ")
			l = append(l, fmt.Sprintf("%s %d %s\n", kind, n, what))
		}
		slices.Sort(l)
		if err := os.WriteFile(exceptions, []byte(strings.Join(l, "")), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	allowed := map[string]int{}
	for line := range strings.Lines(read(t, "tests/arch/"+exceptions)) {
		var kind, what string
		var n int
		if _, err := fmt.Sscan(line, &kind, &n, &what); err != nil {
			t.Fatal(line, err)
		}
		allowed[kind+" "+what] = n
		if found[kind+" "+what] < n {
			t.Logf("%s is %d now: write exceptions.txt anew", strings.TrimSpace(line), found[kind+" "+what])
		}
	}
	for what, n := range found {
		if n > allowed[what] {
			t.Errorf("%s: %d, allowed are %d: see measures", what, n, allowed[what])
		}
	}
}

// measureFile enters what is in a file.
func measureFile(t *testing.T, pkg, name string, text []byte, found map[string]int) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	found["file "+pkg+"/"+name] = bytes.Count(text, []byte("\n"))
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		what := pkg + ":" + fn.Name.Name
		if fn.Recv != nil {
			typ := pkg + ":" + receiver(fn.Recv.List[0].Type)
			found["methods "+typ]++
			what = typ + "." + fn.Name.Name
		}
		what = "function " + what
		found[what] = max(found[what], fset.Position(fn.End()).Line-fset.Position(fn.Pos()).Line+1)
	}
	strs := stringColumns(text)
	for i, line := range strings.Split(string(text), "\n") {
		n := utf8.RuneCountInString(line)
		switch comment := strings.HasPrefix(strings.TrimSpace(line), "//"); {
		case comment && n > 100 && strings.Contains(strings.TrimSpace(line), " "):
			found["comment "+pkg]++
		case !comment && n-strs[i+1] > 120:
			found["code "+pkg]++
		}
	}
}

// receiver is the name of a receiver's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	}
	return calls(e)
}

// stringColumns counts the characters of strings in each line.
func stringColumns(text []byte) map[int]int {
	fset := token.NewFileSet()
	file := fset.AddFile("", fset.Base(), len(text))
	var s scanner.Scanner
	s.Init(file, text, nil, 0)
	n := map[int]int{}
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return n
		}
		if tok != token.STRING {
			continue
		}
		for i, part := range strings.Split(lit, "\n") {
			n[file.Line(pos)+i] += utf8.RuneCountInString(part)
		}
	}
}
