package handlers

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// goodSteps are such as succeed together on the nodes of TestTransactionUndo; images are below dir.
func goodSteps(dir string) []string {
	return []string{
		`{'type': 'block-dirty-bitmap-add', 'data': {'node': 'a', 'name': 'new'}}`,
		`{'type': 'block-dirty-bitmap-merge', 'data': {'node': 'a', 'target': 'old', 'bitmaps': ['off', {'node': 'b', 'name': 'off'}]}}`,
		`{'type': 'block-dirty-bitmap-clear', 'data': {'node': 'a', 'name': 'off'}}`,
		`{'type': 'block-dirty-bitmap-enable', 'data': {'node': 'a', 'name': 'off'}}`,
		`{'type': 'block-dirty-bitmap-disable', 'data': {'node': 'a', 'name': 'old'}}`,
		`{'type': 'block-dirty-bitmap-remove', 'data': {'node': 'b', 'name': 'old'}}`,
		`{'type': 'blockdev-snapshot-sync', 'data': {'node-name': 'a', 'snapshot-node-name': 'over', 'snapshot-file': '` + filepath.Join(dir, "over") + `'}}`,
		`{'type': 'blockdev-snapshot', 'data': {'node': 'b', 'overlay': 'q'}}`,
		`{'type': 'blockdev-snapshot-sync', 'data': {'node-name': 'over', 'snapshot-node-name': 'over2', 'snapshot-file': '` + filepath.Join(dir, "over2") + `'}}`,
		`{'type': 'block-dirty-bitmap-add', 'data': {'node': 'over2', 'name': 'new', 'persistent': true}}`,
		`{'type': 'blockdev-snapshot-internal-sync', 'data': {'device': 'over2', 'name': 'inside'}}`,
		`{'type': 'blockdev-snapshot', 'data': {'node': 'over2', 'overlay': 'r'}}`,
	}
}

// badSteps are such as fail there, and how.
var badSteps = []struct{ step, want string }{
	{`{'type': 'abort', 'data': {}}`, "Transaction aborted using Abort action"},
	{`{'type': 'block-dirty-bitmap-add', 'data': {'node': 'b', 'name': 'off'}}`, "Bitmap already exists: off"},
	{`{'type': 'block-dirty-bitmap-clear', 'data': {'node': 'a', 'name': 'none'}}`, "Dirty bitmap 'none' not found"},
	{`{'type': 'block-dirty-bitmap-merge', 'data': {'node': 'b', 'target': 'off', 'bitmaps': ['off', 'none']}}`, "Dirty bitmap 'none' not found"},
	{`{'type': 'blockdev-snapshot', 'data': {'node': 'c', 'overlay': 'none'}}`, "Cannot find device='none' nor node-name='none'"},
	{`{'type': 'blockdev-snapshot-sync', 'data': {'node-name': 'c', 'snapshot-node-name': 'x', 'snapshot-file': '/nonexistent/x'}}`,
		"Could not create '/nonexistent/x': No such file or directory"},
}

// A step that fails, at any place among others that would not, leaves no trace of any of them.
func TestTransactionUndo(t *testing.T) {
	g := drivertest.NewGraph(t)
	nodes := blockdev.New(g, blockdev.Config{Drivers: drivers.All})
	c := commands{}
	m := jobs.NewManager(&drivertest.Sink{}, nil)
	types.RegisterBlockCore(c, BlockCore{Nodes: nodes, Jobs: m})
	types.RegisterTransaction(c, Transaction{Nodes: nodes, Jobs: BlockJob{Graph: g, Jobs: m, Nodes: nodes}})
	dir := t.TempDir()
	ok := func(name, args string) {
		t.Helper()
		if got := c.say(t, name, args); got != "{}" {
			t.Fatalf("%s: %s", name, got)
		}
	}
	for _, n := range []string{"a", "b"} {
		ok("blockdev-add", `{'driver': 'null-co', 'node-name': '`+n+`'}`)
		ok("block-dirty-bitmap-add", `{'node': '`+n+`', 'name': 'old'}`)
		ok("block-dirty-bitmap-add", `{'node': '`+n+`', 'name': 'off', 'disabled': true}`)
		g.Node(n).Bitmaps().Find("old").Bits().Set(0, 1<<20)
		g.Node(n).Bitmaps().Find("off").Bits().Set(1<<19, 1<<20)
	}
	ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'c'}`)
	steps := goodSteps(dir)
	for _, n := range []string{"q", "r"} {
		ok("blockdev-snapshot-sync", `{'node-name': 'b', 'snapshot-node-name': '`+n+`', 'snapshot-file': '`+filepath.Join(dir, n)+`'}`)
		ok("blockdev-add", `{'driver': 'qcow2', 'node-name': '`+n+`', 'backing': null, 'file': {'driver': 'file', 'filename': '`+filepath.Join(dir, n)+`'}}`)
	}
	see := func() string {
		s := c.say(t, "query-named-block-nodes", `{}`) + c.say(t, "x-debug-query-block-graph", `{}`)
		for _, n := range []string{"a", "b"} {
			for _, d := range []string{"old", "off"} {
				s += c.say(t, "x-debug-block-dirty-bitmap-sha256", fmt.Sprintf(`{'node': '%s', 'name': '%s'}`, n, d))
			}
		}
		return s
	}
	before := see()
	for _, f := range badSteps {
		for i := range len(steps) + 1 {
			l := append(append(append([]string{}, steps[:i]...), f.step), steps[i:]...)
			got := c.say(t, "transaction", `{'actions': [`+strings.Join(l, ", ")+`]}`)
			if !strings.HasSuffix(got, f.want) {
				t.Errorf("%s at %d: %s", f.step, i, got)
			}
			if after := see(); after != before {
				t.Fatalf("%s at %d left\n%s, it was\n%s", f.step, i, after, before)
			}
		}
	}
	ok("transaction", `{'actions': [`+strings.Join(steps, ", ")+`]}`)
	if see() == before || g.Node("r").Backing().Node().Backing().Node() != g.Node("over") ||
		g.Node("a").Bitmaps().Find("new") == nil || g.Node("b").Bitmaps().Find("old") != nil {
		t.Error("without a failing step nothing happens")
	}
}
