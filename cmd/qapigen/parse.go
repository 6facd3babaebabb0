package main

import (
	"cmp"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strings"

	qapi "github.com/digitalocean/go-qemu/qapi-schema"

	"qblockd/schema/model"
)

// mainFile includes all others.
const mainFile = "qapi-schema.json"

// load reads, resolves and checks the schema in fsys.
func load(fsys fs.FS) (*model.Schema, error) {
	s, err := model.Build(mainFile, func(file string) ([]model.Expr, error) {
		text, err := fs.ReadFile(fsys, file)
		if err != nil {
			return nil, err
		}
		return parse(file, string(text))
	})
	if err != nil {
		return nil, err
	}
	files, err := fs.Glob(fsys, "*.json")
	if err != nil {
		return nil, err
	}
	if len(files) != len(s.Files) {
		return nil, fmt.Errorf("%d files are there, %d are included", len(files), len(s.Files))
	}
	return s, nil
}

// parse reads one file with go-qemu's parser and proves that all of it was read:
// the independent scanner must find the same number of expressions, and each of
// them must mean the same, member by member. The scanner runs first: it refuses
// input on which the parser would not return (a comment without newline at the end).
// Documentation and line numbers, which the parser drops, come from the scanner.
func parse(file, text string) ([]model.Expr, error) {
	scanned, err := model.Scan(file, text)
	if err != nil {
		return nil, err
	}
	tree, err := qapi.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for i, e := range scanned {
		if i == len(tree.Children) {
			return nil, fmt.Errorf("%s:%d: the parser stopped here", file, e.Line)
		}
		parsed, err := fromTree(tree.Children[i])
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, e.Line, err)
		}
		if want := canonical(e.Dict); !reflect.DeepEqual(parsed, want) {
			return nil, fmt.Errorf("%s:%d: the parser read %v instead of %v", file, e.Line, parsed, want)
		}
		scanned[i].Dict = parsed
	}
	if n := len(tree.Children); n > len(scanned) {
		return nil, fmt.Errorf("%s: the parser found %d expressions more than there are", file, n-len(scanned))
	}
	return scanned, nil
}

// keyOrder sorts the keys of an expression; the parser does not keep their order.
var keyOrder = strings.Fields("include enum struct union alternate command event name type base discriminator data returns boxed allow-oob features")

// sorted sorts d; keys that are not listed come first.
func sorted(d model.Dict) model.Dict {
	rank := func(p model.Pair) int { return slices.Index(keyOrder, p.Key) }
	slices.SortStableFunc(d, func(a, b model.Pair) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Key, b.Key))
	})
	return d
}

// canonical brings an expression into the one form that fromTree makes: keys in a
// fixed order, short forms where they say all. The order of members, values and
// branches is kept.
func canonical(d model.Dict) model.Dict {
	out := model.Dict{}
	for _, p := range d {
		v := p.Val
		switch p.Key {
		case "data", "base":
			switch data := v.(type) {
			case model.Dict:
				ms := model.Dict{}
				for _, m := range data {
					ms = append(ms, model.Pair{Key: m.Key, Val: short(m.Val, "type")})
				}
				v = ms
			case model.List:
				v = shortList(data)
			}
		case "features":
			if l, ok := v.(model.List); ok {
				v = shortList(l)
			}
		}
		out = append(out, model.Pair{Key: p.Key, Val: v})
	}
	return sorted(out)
}

func shortList(l model.List) model.List {
	out := model.List{}
	for _, e := range l {
		out = append(out, short(e, "name"))
	}
	return out
}

// short reduces {key: v} to v.
func short(v any, key string) any {
	d, ok := v.(model.Dict)
	if !ok {
		return v
	}
	if len(d) == 1 && d[0].Key == key {
		return d[0].Val
	}
	out := model.Dict{}
	for _, p := range d {
		if l, ok := p.Val.(model.List); ok && p.Key == "features" {
			p.Val = shortList(l)
		}
		out = append(out, p)
	}
	return sorted(out)
}
