package model

import (
	"fmt"
	"slices"
	"strings"
)

// Source is one file of a schema, read.
type Source struct {
	File  string
	Exprs []Expr
}

// Build resolves and checks a schema. main is the file everything else is included
// from; read returns the expressions of a file. An error names file and line.
func Build(main string, read func(file string) ([]Expr, error)) (s *Schema, err error) {
	b := &builder{
		Schema: &Schema{types: map[string]*Type{}},
		seen:   map[string]bool{},
		names:  map[string]string{},
		exprs:  map[string]Dict{},
	}
	defer catch(&err)
	for name := range jsonTypes {
		b.types[name] = &Type{Name: name, Kind: Builtin}
	}
	var sources []Source
	b.include(main, read, &sources)
	for _, src := range sources {
		b.Files = append(b.Files, src.File)
		for _, e := range src.Exprs {
			b.declare(src.File, e)
		}
	}
	for _, src := range sources {
		for _, e := range src.Exprs {
			b.define(src.File, e)
		}
	}
	b.check()
	return b.Schema, nil
}

type builder struct {
	*Schema
	seen  map[string]bool   // files included
	names map[string]string // defined names, with where
	exprs map[string]Dict   // definitions of types
	at    string            // "file:line" now being read
}

func (b *builder) fail(format string, args ...any) {
	panic(scanError{fmt.Errorf("%s: %s", b.at, fmt.Sprintf(format, args...))})
}

// include reads file and then the files it includes that were not met before: files
// are ordered by the first statement that includes them.
func (b *builder) include(file string, read func(string) ([]Expr, error), out *[]Source) {
	if b.seen[file] {
		return
	}
	b.seen[file] = true
	at := len(*out)
	*out = append(*out, Source{})
	exprs, err := read(file)
	if err != nil {
		panic(scanError{err})
	}
	src := Source{File: file}
	for _, e := range exprs {
		b.at = fmt.Sprintf("%s:%d", file, e.Line)
		if inc, ok := e.Dict.Get("include").(string); ok {
			if len(e.Dict) != 1 {
				b.fail("an inclusion has only one key")
			}
			b.include(inc, read, out)
			continue
		}
		src.Exprs = append(src.Exprs, e)
	}
	(*out)[at] = src
}

// metas are the kinds of definitions and the keys that each must or may have.
var metas = map[string]struct{ need, may string }{
	"enum":      {"data", "features"},
	"struct":    {"data", "base features"},
	"union":     {"data base discriminator", "features"},
	"alternate": {"data", "features"},
	"command":   {"", "data returns boxed features allow-oob"},
	"event":     {"", "data features"},
}

// declare registers the name of a definition.
func (b *builder) declare(file string, e Expr) {
	b.at = fmt.Sprintf("%s:%d", file, e.Line)
	meta, name := b.meta(e.Dict)
	if where := b.names[name]; where != "" {
		b.fail("'%s' is already defined in %s", name, where)
	}
	if b.types[name] != nil {
		b.fail("'%s' is a built-in type", name)
	}
	b.names[name] = b.at
	kinds := map[string]Kind{"enum": Enum, "struct": Object, "union": Object, "alternate": Alternate}
	if k, ok := kinds[meta]; ok {
		t := &Type{Name: name, Kind: k, File: file, Line: e.Line}
		b.types[name] = t
		b.Types = append(b.Types, t)
	}
}

func (b *builder) meta(d Dict) (meta, name string) {
	for _, p := range d {
		if _, ok := metas[p.Key]; ok {
			if meta != "" {
				b.fail("both '%s' and '%s'", meta, p.Key)
			}
			meta = p.Key
		}
	}
	if meta == "" {
		b.fail("neither a definition nor an inclusion")
	}
	name, ok := d.Get(meta).(string)
	if !ok {
		b.fail("the name after '%s' is not a string", meta)
	}
	allowed := " " + meta + " " + metas[meta].need + " " + metas[meta].may + " "
	for _, p := range d {
		if !strings.Contains(allowed, " "+p.Key+" ") {
			b.fail("%s '%s' has a key '%s', which is not supported", meta, name, p.Key)
		}
	}
	for _, k := range strings.Fields(metas[meta].need) {
		if d.Get(k) == nil {
			b.fail("%s '%s' lacks '%s'", meta, name, k)
		}
	}
	return meta, name
}

// define fills in what declare left open.
func (b *builder) define(file string, e Expr) {
	b.at = fmt.Sprintf("%s:%d", file, e.Line)
	meta, name := b.meta(e.Dict)
	if e.Doc == "" {
		b.fail("'%s' has no documentation comment", name)
	}
	doc, err := parseDoc(name, e.Doc)
	if err != nil {
		b.fail("%v", err)
	}
	features := b.features(e.Dict.Get("features"))
	data := e.Dict.Get("data")
	head := Entity{Name: name, File: file, Line: e.Line, Doc: doc, Features: features}
	switch meta {
	case "command":
		c := &Command{Entity: head}
		c.Boxed, c.AllowOOB = b.flag(e.Dict, "boxed"), b.flag(e.Dict, "allow-oob")
		c.Arg = b.args(c.Name, data, doc)
		if c.Boxed && (c.Arg == nil || c.Arg.Implicit) {
			b.fail("command '%s' is boxed but has no named type", name)
		}
		if c.Arg != nil && c.Arg.Tag != nil && !c.Boxed {
			b.fail("command '%s' takes a union and is not boxed", name)
		}
		if r := e.Dict.Get("returns"); r != nil {
			c.Ret = b.ref(r)
		}
		b.Commands, b.Entities = append(b.Commands, c), append(b.Entities, c)
		b.checkFeatureDocs(name, features, c.Arg, doc)
		return
	case "event":
		ev := &Event{head}
		ev.Arg = b.args(ev.Name, data, doc)
		b.Events, b.Entities = append(b.Events, ev), append(b.Entities, ev)
		return
	}
	t := b.types[name]
	t.Doc, t.Features = doc, features
	switch meta {
	case "enum":
		b.enum(t, data)
	case "union":
		b.union(t, e.Dict)
	case "struct", "alternate":
		if base := e.Dict.Get("base"); base != nil {
			t.Base = b.ref(base)
		}
		t.Local = b.members(data, doc)
	}
	b.checkFeatureDocs(name, features, t, doc)
}

func (b *builder) flag(d Dict, key string) bool {
	v := d.Get(key)
	if v == nil {
		return false
	}
	if v != true {
		b.fail("'%s' may only be true", key)
	}
	return true
}

func (b *builder) enum(t *Type, data any) {
	l, ok := data.(List)
	if !ok {
		b.fail("the data of an enum is a list")
	}
	for _, v := range l {
		switch v := v.(type) {
		case string:
			t.Values = append(t.Values, Value{Name: v})
		case Dict:
			name, ok := v.Get("name").(string)
			if !ok || len(v) > 2 || len(v) == 2 && v.Get("features") == nil {
				b.fail("bad value in enum '%s'", t.Name)
			}
			t.Values = append(t.Values, Value{Name: name, Features: b.features(v.Get("features"))})
		default:
			b.fail("bad value in enum '%s'", t.Name)
		}
	}
}

func (b *builder) union(t *Type, d Dict) {
	tag, ok := d.Get("discriminator").(string)
	if !ok {
		b.fail("the discriminator is not a string")
	}
	if base, ok := d.Get("base").(Dict); ok {
		t.Local = b.members(base, t.Doc)
	} else {
		t.Base = b.ref(d.Get("base"))
	}
	branches, ok := d.Get("data").(Dict)
	if !ok {
		b.fail("the data of a union is an object")
	}
	for _, p := range branches {
		name, ok := p.Val.(string)
		if !ok {
			b.fail("branch '%s' is not given by a type name", p.Key)
		}
		t.Variants = append(t.Variants, Variant{Case: p.Key, Type: b.ref(name)})
	}
	// The tag is found by name: a base that is defined further down has no members yet.
	t.Tag = &Member{Name: tag}
}

// args resolves the data of a command or event.
func (b *builder) args(owner string, data any, doc Doc) *Type {
	switch d := data.(type) {
	case nil:
		return nil
	case string:
		return b.ref(d)
	case Dict:
		name := "q_obj_" + owner + "-arg"
		t := &Type{Name: name, Kind: Object, Implicit: true, File: b.at[:strings.IndexByte(b.at, ':')], Doc: doc}
		t.Local = b.members(d, doc)
		b.types[name] = t
		b.Types = append(b.Types, t)
		return t
	}
	b.fail("bad data of '%s'", owner)
	return nil
}

func (b *builder) members(data any, doc Doc) []*Member {
	d, ok := data.(Dict)
	if !ok {
		b.fail("members are not given by an object")
	}
	var ms []*Member
	for _, p := range d {
		m := &Member{Name: strings.TrimPrefix(p.Key, "*"), Optional: p.Key[0] == '*'}
		m.Doc = doc.Members[m.Name]
		ext, isExt := p.Val.(Dict)
		if !isExt {
			m.Type = b.ref(p.Val)
		} else {
			if len(ext) > 2 || len(ext) == 2 && ext.Get("features") == nil {
				b.fail("member '%s' has unknown keys", m.Name)
			}
			m.Type, m.Features = b.ref(ext.Get("type")), b.features(ext.Get("features"))
		}
		ms = append(ms, m)
	}
	return ms
}

// ref resolves a type name, or a list of one for an array.
func (b *builder) ref(v any) *Type {
	switch v := v.(type) {
	case string:
		if t := b.types[v]; t != nil {
			return t
		}
		b.fail("there is no type '%s'", v)
	case List:
		if len(v) != 1 {
			b.fail("an array type has one element type")
		}
		elem := b.ref(v[0])
		name := elem.Name + "List"
		if b.types[name] == nil {
			b.types[name] = &Type{Name: name, Kind: Array, Elem: elem}
		}
		return b.types[name]
	}
	b.fail("bad reference to a type")
	return nil
}

func (b *builder) features(v any) []string {
	if v == nil {
		return nil
	}
	l, ok := v.(List)
	if !ok || len(l) == 0 {
		b.fail("features are not a list")
	}
	var fs []string
	for _, f := range l {
		s, ok := f.(string)
		if !ok {
			b.fail("a feature is not a string")
		}
		if slices.Contains(fs, s) {
			b.fail("feature '%s' twice", s)
		}
		fs = append(fs, s)
	}
	return fs
}
