package arch

import (
	"bytes"
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

// The most of each measure of the code.
const (
	functionLines  = 70
	fileLines      = 500
	methodsOfType  = 40
	commentColumns = 100
	codeColumns    = 120 // not counting strings: who looks for a text finds it in one piece
)

func TestMeasures(t *testing.T) {
	for _, p := range list(t, "./...") {
		methods := map[string]int{}
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			text, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if !generated.Match(text) {
				measureFile(t, p.name()+"/"+name, text, methods)
			}
		}
		for typ, n := range methods {
			if n > methodsOfType {
				t.Errorf("%s: %s has %d methods, allowed are %d", p.name(), typ, n, methodsOfType)
			}
		}
	}
}

// measureFile checks a file, and counts the methods that are in it.
func measureFile(t *testing.T, path string, text []byte, methods map[string]int) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, path, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(text, []byte("\n")); n > fileLines {
		t.Errorf("%s has %d lines, allowed are %d", path, n, fileLines)
	}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if fn.Recv != nil {
			methods[receiver(fn.Recv.List[0].Type)]++
		}
		if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > functionLines {
			t.Errorf("%s: %s has %d lines, allowed are %d", path, fn.Name.Name, n, functionLines)
		}
	}
	strs := stringColumns(text)
	for i, line := range strings.Split(string(text), "\n") {
		n := utf8.RuneCountInString(line)
		switch comment := strings.HasPrefix(strings.TrimSpace(line), "//"); {
		case comment && n > commentColumns && strings.Contains(strings.TrimSpace(line), " "):
			t.Errorf("%s:%d: a comment of %d columns, allowed are %d", path, i+1, n, commentColumns)
		case !comment && n-strs[i+1] > codeColumns:
			t.Errorf("%s:%d: code of %d columns, allowed are %d", path, i+1, n-strs[i+1], codeColumns)
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
