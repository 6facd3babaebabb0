package main

import (
	"errors"
	"strings"
	"testing"

	"qblockd/schema"
)

func TestSplitLine(t *testing.T) {
	for _, c := range []struct{ line, want string }{
		{"", ""},
		{"  query-jobs\t ", "query-jobs"},
		{"a b=c  d=e", "a|b=c|d=e"},
		{`a b="x y" c='x y' 'd=1 2'`, `a|b="x y"|c=x y|d=1 2`},
		{`a {"b": [1, "}"]} c`, `a|{"b": [1, "}"]}|c`},
		{`a b=["x", 'y']`, `a|b=["x", 'y']`},
		{`a b="q\" r" c=`, `a|b="q\" r"|c=`},
		{`a ''`, `a|`},
	} {
		words, err := splitLine(c.line)
		if c.line == `a ''` {
			words = append(words, "") // an empty last word is none
		}
		if err != nil || strings.Join(words, "|") != c.want {
			t.Errorf("%s: %q %v, want %s", c.line, words, err, c.want)
		}
	}
	for _, bad := range []string{`a "b`, `a 'b`, `a {"b"`, `a [1`} {
		if words, err := splitLine(bad); !errors.Is(err, errOpen) {
			t.Errorf("%s: %q %v", bad, words, err)
		}
	}
}

func TestComplete(t *testing.T) {
	s := &shell{app: &app{}, schema: builtin()}
	c := &completer{schema: s.schema, names: func(k kind, _ string) []string {
		return map[kind][]string{kindNode: {"disk", "top"}, kindJob: {"j1"}, kindExport: {"e1"}, kindObject: {"io"}}[k]
	}}
	for _, tt := range []struct{ line, want string }{
		{"blockdev-a", "blockdev-add"},
		{"blockdev-add dri", "driver="},
		{"blockdev-add driver=q", "driver=qcow2|driver=quorum"},
		{"blockdev-add driver=qcow2 driv", ""},
		{"blockdev-add driver=qcow2 lazy", "lazy-refcounts="},
		{"blockdev-add driver=qcow2 lazy-refcounts=", "lazy-refcounts=false|lazy-refcounts=true"},
		{"blockdev-add lazy", ""},
		{"blockdev-add driver=qcow2 fi", "file.|file="},
		{"blockdev-add driver=qcow2 file=", "file=disk|file=top"},
		{"blockdev-add driver=qcow2 backing=", "backing=null|backing=disk|backing=top"},
		{"blockdev-add driver=qcow2 node-name=d", ""},
		{"blockdev-add driver=qcow2 file.driver=file file.fi", "file.filename="},
		{"blockdev-add driver=qcow2 file.driver=raw file.file.driver=file file.file.a", "file.file.auto-read-only=|file.file.active=|file.file.aio=|file.file.aio-max-batch="},
		{"blockdev-create options.driver=qcow2 options.file=t", "options.file=top"},
		{"blockdev-del node-name=", "node-name=disk|node-name=top"},
		{"block-stream device=t", "device=top"},
		{"job-cancel id=", "id=j1"},
		{"block-job-cancel device=", "device=j1"},
		{"block-export-del id=", "id=e1"},
		{"block-export-add type=nbd id=", ""},
		{"block-export-add type=nbd id=x iothread=", "iothread=io"},
		{"nbd-server-start addr.type=un", "addr.type=unix"},
		{"no-such-command x", ""},
	} {
		words, last, err := scanLine(tt.line)
		var got []string
		if len(words) == 0 {
			got = c.commands(last)
		} else {
			got = c.argument(words[0], words[1:], last)
		}
		if err != nil || strings.Join(got, "|") != tt.want {
			t.Errorf("%s: %q %v, want %s", tt.line, got, err, tt.want)
		}
	}
	// Every argument that is completed is one that completes again and can be found.
	for _, command := range schema.Commands() {
		for _, w := range c.argument(command, nil, "") {
			if !goesOn(w) {
				t.Errorf("%s: %q is no argument yet", command, w)
			}
			if _, ok := c.schema.Find(command, w[:len(w)-1], arguments{}.text); !ok {
				t.Errorf("%s: %q is not found", command, w)
			}
		}
	}
}

func TestShellCompletion(t *testing.T) {
	s := &shell{app: &app{}, schema: builtin()}
	for _, tt := range []struct{ line, head, want, tail string }{
		{"jo|", "", "job-cancel |job-complete |job-dismiss |job-finalize |job-pause |job-resume |jobs ", ""},
		{"help block-st|", "help ", "block-stream ", ""},
		{"help blockdev-add dri|", "help blockdev-add ", "driver=", ""},
		{"graph --f|", "graph ", "--format ", ""},
		{"graph --format s|", "graph --format ", "svg ", ""},
		{"events o|", "events ", "off |on ", ""},
		{"jobs -|", "jobs ", "--watch ", ""},
		{"é=1 job|x", "é=1 ", "", "x"},
		{"quit 'a|", "quit 'a", "", ""},
	} {
		left, right, _ := strings.Cut(tt.line, "|")
		head, l, tail := s.complete(left+right, len([]rune(left)))
		if head != tt.head || strings.Join(l, "|") != tt.want || tail != tt.tail {
			t.Errorf("%s: %q %q %q", tt.line, head, l, tail)
		}
	}
}
