package main

import (
	"bytes"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"qblockd/schema"
	"qblockd/schema/model"
	"qblockd/schema/value"
)

// TestUpToDate makes sure that what is committed is what the generator makes.
func TestUpToDate(t *testing.T) {
	want, err := generate(schema.QAPI())
	if err != nil {
		t.Fatal(err)
	}
	have, err := committed("../../schema")
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if !bytes.Equal(have[name], want[name]) {
			t.Errorf("schema/%s is not up to date: run go generate ./schema/...", name)
		}
	}
	for name := range have {
		if want[name] == nil {
			t.Errorf("schema/%s is not made by the generator any more", name)
		}
	}
	again, err := generate(schema.QAPI())
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if !bytes.Equal(again[name], want[name]) {
			t.Errorf("schema/%s comes out differently each time", name)
		}
	}
}

func sources(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	names, err := fs.Glob(schema.QAPI(), "*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(schema.QAPI(), name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(text)
	}
	return files
}

// codeBytes calls f for bytes that are neither in a comment nor white space: for all of
// them in small files, for some in large ones.
func codeBytes(text string, f func(i int)) {
	comment, n, step := false, 0, 1+len(text)/3000
	for i := range len(text) {
		switch c := text[i]; {
		case c == '\n':
			comment = false
		case c == '#':
			comment = true
		case !comment && c != ' ':
			if n++; n%step == 0 {
				f(i)
			}
		}
	}
}

// TestTruncated cuts each file in many places: what is left must be refused,
// save where the cut falls between two expressions.
func TestTruncated(t *testing.T) {
	for name, text := range sources(t) {
		codeBytes(text, func(i int) {
			// The newline makes the cut look like the end of a file.
			exprs, err := parse(name, text[:i]+"\n")
			if err == nil && text[i] != '{' {
				t.Errorf("%s cut at byte %d was accepted with %d expressions", name, i, len(exprs))
			}
		})
	}
}

// TestGarbled removes single brackets, quotes, commas and colons.
func TestGarbled(t *testing.T) {
	for name, text := range sources(t) {
		codeBytes(text, func(i int) {
			if !strings.ContainsRune("{}[]':,", rune(text[i])) {
				return
			}
			if _, err := parse(name, text[:i]+text[i+1:]); err == nil {
				t.Errorf("%s was accepted without the %q at byte %d", name, text[i], i)
			}
		})
	}
}

// TestParserStops has input on which go-qemu's parser ends early or misreads, and
// reports nothing: the comparison must notice. The scanner accepts all of it.
func TestParserStops(t *testing.T) {
	const good = "{ 'struct': 'A', 'data': { 'a': 'int' } }\n"
	for _, c := range []struct{ text, want string }{
		{good + "{ 'struct': 'B', 'data': {}, 'colour': 'red' }\n" + good, "f:2: the parser stopped here"},
		{good + "{ 'data': {}, 'struct': 'B' }\n", "f:2: the parser stopped here"},
		{good + "{ 'union': 'B', 'data': {} }\n", "f:2: the parser stopped here"},
		{good + "{ 'command': 'b', 'data': [ 'A' ] }\n", "f:2: the parser stopped here"},
		{"{ 'command': 'b', 'boxed': false }\n", "f:1: the parser read"},
		{"{ 'struct': 'B', 'data': { 'a': 'int' }, 'data': { 'b': 'int' } }\n", "f:1: duplicate key 'data'"},
		{"{ 'struct': 'B', 'data': { 'a': 'int', 'a': 'str' } }\n", "f:1: duplicate key 'a'"},
		{"{ 'struct': 'B', 'data': { 'a': 'int' }, 'if': 'CONFIG_B' }\n", "f:1: conditions are not supported"},
		{"{ 'struct': 'B', 'data': { 'a': { 'type': 'int', 'if': 'CONFIG_B' } } }\n", "f:1: conditions are not supported"},
		{"{ 'pragma': { 'doc-required': true } }\n", "f:1: expressions like this"},
		{"{ 'struct': 'B', 'data': {} } # no newline", "f:1: no newline at the end of the file"},
		{"{ 'struct': 'B', 'data': {} }\x00\n" + good, "f:1: expected '{'"},
		{"\ufeff" + good, "f:1: expected '{'"},
		{"{ 'struct': 'Bé', 'data': {} }\n", "f:1: illegal character"},
	} {
		_, err := parse("f", c.text)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%q\n got  %v\n want %s...", c.text, err, c.want)
		}
	}
	exprs, err := parse("f", good)
	if err != nil || len(exprs) != 1 {
		t.Errorf("good input: %v, %v", exprs, err)
	}
}

// TestIncluded makes sure that a file that nobody includes is not overlooked.
func TestIncluded(t *testing.T) {
	fsys := fstest.MapFS{
		mainFile:     {Data: []byte("{ 'include': 'a.json' }\n")},
		"a.json":     {Data: []byte("##\n# @quit:\n#\n# End.\n##\n{ 'command': 'quit' }\n")},
		"stray.json": {Data: []byte("\n")},
	}
	if _, err := load(fsys); err == nil || err.Error() != "3 files are there, 2 are included" {
		t.Errorf("got %v", err)
	}
}

func TestNames(t *testing.T) {
	for qapi, want := range map[string]string{
		"node-name": "NodeName", "job-id": "JobID", "id": "ID", "x-debug-query-block-graph": "XDebugQueryBlockGraph",
		"block_resize": "BlockResize", "qmp_capabilities": "QmpCapabilities", "io_uring": "IoUring", "null-co": "NullCo",
		"bps_rd_max": "BpsRdMax", "utf8": "Utf8", "consistent-read": "ConsistentRead", "idle_time_ns": "IdleTimeNs",
	} {
		if got := camel(qapi); got != want {
			t.Errorf("%s: got %s, want %s", qapi, got, want)
		}
	}
	if got := eventName("BLOCK_JOB_READY"); got != "BlockJobReadyEvent" {
		t.Errorf("event: got %s", got)
	}
}

// TestNameConflict: two members that would become one field.
func TestNameConflict(t *testing.T) {
	text := "##\n# @A:\n#\n# It.\n#\n# @a-b1: one\n# @a-b-1: two\n##\n{ 'struct': 'A', 'data': { 'a-b1': 'int', 'a-b-1': 'int' } }\n"
	_, err := generate(fstest.MapFS{mainFile: {Data: []byte(text)}})
	if err == nil || err.Error() != "'a-b1' and 'a-b-1' would both be called AB1 in Go" {
		t.Errorf("got %v", err)
	}
}

// TestHashOrder compares the order fixed at generation with that of objects which are
// put together at run time, for every type and branch.
func TestHashOrder(t *testing.T) {
	s, err := load(schema.QAPI())
	if err != nil {
		t.Fatal(err)
	}
	check := func(name string, ms []*model.Member) {
		d, want := &value.Dict{}, &strings.Builder{}
		for _, m := range ms {
			d.Set(m.Name, true)
		}
		for _, m := range hashOrder(ms) {
			want.WriteString(m.Name + " ")
		}
		got := strings.NewReplacer(`{"`, "", `": true}`, " ", `": true, "`, " ").Replace(string(value.Append(nil, d)))
		if len(ms) > 0 && got != want.String() {
			t.Errorf("%s: fixed as %s, at run time %s", name, want, got)
		}
	}
	check("a bucket with two", []*model.Member{{Name: "node-name"}, {Name: collide("node-name")}})
	for _, typ := range s.Types {
		if typ.Kind != model.Object {
			continue
		}
		check(typ.Name, typ.Members())
		for _, v := range typ.Variants {
			check(typ.Name+"."+v.Case, append(typ.Members(), v.Type.Members()...))
		}
	}
}

// collide finds another name in the same bucket.
func collide(name string) string {
	for a := 'a'; ; a++ {
		for b := 'a'; b <= 'z'; b++ {
			for c := 'a'; c <= 'z'; c++ {
				if n := string([]rune{a, b, c}); value.Bucket(n) == value.Bucket(name) {
					return n
				}
			}
		}
	}
}
