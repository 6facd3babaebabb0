// Command qapigen turns our QAPI files into everything that the daemon and its
// clients need of the schema, as source text and data that is committed:
//
//	schema/types/*.gen.go    Go types, decoders, encoders, events, handler interfaces
//	schema/gen/*.json        replies to query-qmp-schema and query-commands
//	schema/gen/jsonschema/   one JSON Schema a command
//
// It is run by "go generate ./schema/...". The output depends on the input alone,
// and a test compares it with what is committed.
//
// The files are parsed by go-qemu's parser, which returns what it has understood so
// far and no error when it meets something else. So its reading is compared with
// that of an independent scanner (schema/model), expression by expression.
package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	dir := flag.String("schema", ".", "the directory schema/ of the source tree")
	flag.Parse()
	if err := run(*dir); err != nil {
		fmt.Fprintln(os.Stderr, "qapigen:", err)
		os.Exit(1)
	}
}

// run regenerates everything below dir and removes generated files that are no longer made.
func run(dir string) error {
	out, err := generate(os.DirFS(filepath.Join(dir, "qapi")))
	if err != nil {
		return err
	}
	old, err := committed(dir)
	if err != nil {
		return err
	}
	for name := range old {
		if _, ok := out[name]; !ok {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(out)) {
		path := filepath.Join(dir, name)
		if string(old[name]) == string(out[name]) {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			return err
		}
		if err := os.WriteFile(path, out[name], 0o666); err != nil {
			return err
		}
	}
	return nil
}

// committed reads the generated files that are there, by name relative to dir.
func committed(dir string) (map[string][]byte, error) {
	files := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		if !strings.HasSuffix(name, ".gen.go") && !strings.HasPrefix(name, "gen/") {
			return nil
		}
		files[name], err = os.ReadFile(path)
		return err
	})
	return files, err
}
