package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// uncontained are the goroutines of the daemon that are not started by package panics, with the
// reason.
var uncontained = map[string]string{
	"jobs/blockjob/site.go: context.AfterFunc":    "it calls a context.CancelFunc",
	"blockdev/export/nbd/workers.go: go w.work()": "a go statement with arguments would allocate; work begins with a deferred Catch",
}

// A goroutine in which a panic ends the daemon takes all disks along: in the code of the daemon
// each is started by package panics.
func TestGoroutinesAreContained(t *testing.T) {
	used := map[string]bool{}
	for _, p := range list(t, "./...") {
		name := p.name()
		if name == "events/panics" || strings.HasPrefix(name, "tests") || strings.HasPrefix(name, "cmd/") && name != "cmd/qblockd" || name == "blockdev/drivertest" {
			continue
		}
		for _, f := range p.GoFiles {
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, filepath.Join(p.Dir, f), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			found := func(at token.Pos, what string) {
				key := name + "/" + f + ": " + what
				if used[key] = true; uncontained[key] == "" {
					t.Errorf("%s (line %d): start it by package panics", key, fset.Position(at).Line)
				}
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					found(n.Pos(), "go "+calls(n.Call.Fun)+"()")
				case *ast.CallExpr:
					sel, ok := n.Fun.(*ast.SelectorExpr)
					if !ok {
						break
					}
					// sync.WaitGroup.Go and errgroup.Group.Go take a function alone; those of
					// panics are told what it does.
					if x := calls(sel); len(n.Args) == 1 && sel.Sel.Name == "Go" || x == "time.AfterFunc" || x == "context.AfterFunc" {
						found(n.Pos(), x)
					}
				}
				return true
			})
		}
	}
	for key := range uncontained {
		if !used[key] {
			t.Errorf("%s is not there any more: take it off the list", key)
		}
	}
}

// calls is what a call calls, as in the source.
func calls(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return calls(e.X) + "." + e.Sel.Name
	}
	return "func"
}
