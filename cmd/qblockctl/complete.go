package main

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"qblockd/cmd/qblockctl/introspect"
)

// kind is what a string among the arguments names.
type kind int

const (
	kindNone kind = iota
	kindNode
	kindJob
	kindExport
	kindChardev
	kindObject
	kindPath // of the object tree
	kindFile
)

// completer finds what may be written next, from the schema and the names that live in the daemon.
type completer struct {
	schema *introspect.Schema
	// names asks the daemon; prefix is what is written already.
	names func(k kind, prefix string) []string
}

// commands are the commands that begin with word, and those of more.
func (c *completer) commands(word string, more ...string) []string {
	return begins(slices.Sorted(slices.Values(append(c.schema.Commands(), more...))), word)
}

// argument returns what word, which may be empty, can become as an argument of command behind the
// arguments in before. A completion that ends in "=" or "." goes on.
func (c *completer) argument(command string, before []string, word string) []string {
	given := givenIn(before)
	key, value, ok := strings.Cut(word, "=")
	if ok {
		return c.value(command, key, value, given)
	}
	prefix := key[:strings.LastIndexByte(key, '.')+1]
	if l := c.index(command, prefix, given); l != nil {
		return begins(l, word)
	}
	var l []string
	for _, m := range c.schema.Members(command, prefix, given.text) {
		full := prefix + m.Name
		if _, taken := given[full]; taken {
			continue
		}
		isObject, other := c.schema.Object(m.Type)
		if isObject || c.schema.Type(m.Type).Meta == "array" {
			l = append(l, full+".")
		}
		if other && !given.below(full) {
			l = append(l, full+"=")
		}
	}
	return begins(l, word)
}

// index completes the place in a list: prefix ends in the list's dot.
func (c *completer) index(command, prefix string, given arguments) []string {
	list := strings.TrimSuffix(prefix, ".")
	m, ok := c.schema.Find(command, list, given.text)
	if !ok || c.schema.Type(m.Type).Meta != "array" {
		return nil
	}
	n := 0
	for given.below(prefix+strconv.Itoa(n)) || given.text(prefix+strconv.Itoa(n)) != "" {
		n++
	}
	var l []string
	isObject, other := c.schema.Object(c.schema.Type(m.Type).Element)
	if isObject {
		for i := 0; i <= n; i++ {
			l = append(l, prefix+strconv.Itoa(i)+".")
		}
	}
	if other {
		l = append(l, prefix+strconv.Itoa(n)+"=")
	}
	return l
}

func (c *completer) value(command, key, value string, given arguments) []string {
	m, ok := c.schema.Find(command, key, given.text)
	if !ok {
		return nil
	}
	l := c.schema.Values(m.Type)
	if k := c.kindOf(command, key, m); k != kindNone && c.names != nil {
		l = append(l, c.names(k, value)...)
	}
	l = begins(l, value)
	for i := range l {
		l[i] = key + "=" + l[i]
	}
	return l
}

// nodeMembers are the names of arguments that hold the name of a node that is there.
var nodeMembers = []string{
	"node-name", "device", "node", "base-node", "top-node", "bottom", "target", "overlay", "nodes", "replaces",
}

// kindOf tells what an argument names; the schema itself only says that it is a string.
func (c *completer) kindOf(command, key string, m introspect.Member) kind {
	switch {
	case c.schema.NodeRef(m.Type):
		return kindNode
	case c.schema.Type(m.Type).JSON != "string" && c.schema.Type(m.Type).Meta != "alternate":
		return kindNone
	}
	for _, r := range []struct {
		command, member string
		kind            kind
	}{
		{"job-", "id", kindJob}, {"block-job-", "device", kindJob},
		{"block-export-del", "id", kindExport}, {"nbd-server-remove", "name", kindExport},
		{"ringbuf-", "device", kindChardev}, {"chardev-add", "id", kindNone}, {"chardev-", "id", kindChardev},
		{"object-del", "id", kindObject}, {"qom-", "path", kindPath}, {"", "iothread", kindObject},
		{"blockdev-add", "node-name", kindNone}, // a new name, on every level
		{"", "filename", kindFile}, {"", "path", kindFile}, {"", "config", kindFile},
	} {
		if strings.HasPrefix(command, r.command) && m.Name == r.member {
			return r.kind
		}
	}
	if slices.Contains(nodeMembers, m.Name) && !strings.Contains(key, "options.") {
		return kindNode
	}
	return kindNone
}

// arguments are the KEY=VALUE words of a line by key.
type arguments map[string]string

func givenIn(words []string) arguments {
	a := arguments{}
	for _, w := range words {
		if key, text, ok := strings.Cut(w, "="); ok {
			a[key] = strings.Trim(text, `"`)
		}
	}
	return a
}

func (a arguments) text(key string) string { return a[key] }

// below tells whether there is something under key.
func (a arguments) below(key string) bool {
	for k := range a {
		if strings.HasPrefix(k, key+".") {
			return true
		}
	}
	return false
}

func begins(l []string, word string) []string {
	return slices.DeleteFunc(slices.Clone(l), func(s string) bool { return !strings.HasPrefix(s, word) })
}

// files are the names of files that begin with prefix, folders with their slash.
func files(prefix string) []string {
	dir, _ := filepath.Split(prefix)
	entries, _ := os.ReadDir(cmp.Or(dir, ".")) // what cannot be read is not offered
	var l []string
	for _, e := range entries {
		name := dir + e.Name()
		if e.IsDir() {
			name += "/"
		}
		if !strings.HasPrefix(e.Name(), ".") && !strings.ContainsAny(name, " '\"") {
			l = append(l, name)
		}
	}
	return begins(l, prefix)
}
