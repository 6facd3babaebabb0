package main

import (
	"testing"
	"testing/fstest"
)

// FuzzLoad gives the loader any text as a schema: it ends, with a schema or an error, and what it
// accepts it can generate code for or refuse with an error.
func FuzzLoad(f *testing.F) {
	f.Add("##\n# @a:\n#\n# @x: y\n#\n# Since: 1\n##\n{ 'command': 'a', 'data': { '*x': 'int' }, 'returns': ['str'] }\n")
	f.Add("##\n# @E:\n#\n# @a: b\n##\n{ 'enum': 'E', 'data': [ 'a', { 'name': 'b' } ] }\n")
	f.Add("##\n# @A:\n#\n# @x: y\n##\n{ 'alternate': 'A', 'data': { 'x': 'str', 'y': 'null' } }\n")
	f.Add("{ 'pragma': { 'doc-required': true } }\n# c\n{ 'include': 'b.json' }")
	f.Fuzz(func(t *testing.T, text string) {
		fsys := fstest.MapFS{mainFile: {Data: []byte(text)}, "b.json": {Data: []byte("# nothing\n")}}
		if _, err := load(fsys); err == nil {
			_, _ = generate(fsys)
		}
		delete(fsys, "b.json")
		if _, err := load(fsys); err == nil {
			_, _ = generate(fsys)
		}
	})
}
