// Package introspect reads what query-qmp-schema returns and answers the questions that a person at
// a prompt has: which commands are there, which arguments does one take when these are given
// already, what may stand for them.
//
// Everything is pure: the reply goes in once, nothing is asked of a daemon later.
package introspect

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Schema is the interface of a daemon.
type Schema struct {
	types    map[string]*Type
	commands map[string]string // name -> type of the arguments
	events   []string
}

// Type is one entity that a value may be of.
type Type struct {
	Meta    string   // builtin, enum, array, object or alternate
	JSON    string   // of a builtin: string, int, number, boolean, null, value
	Values  []string // of an enum
	Element string   // of an array: the type's name

	Members  []Member          // of an object, in the order of the schema
	Tag      string            // of an object with variants: the member that tells which
	Variants map[string]string // value of the tag -> type with further members
	Choices  []string          // of an alternate: the types' names
}

// Member is an argument, or a member of an object.
type Member struct {
	Name     string
	Type     string
	Optional bool
}

// Parse reads the reply to query-qmp-schema.
func Parse(reply []byte) (*Schema, error) {
	var entities []struct {
		Name        string            `json:"name"`
		Meta        string            `json:"meta-type"`
		JSON        string            `json:"json-type"`
		ArgType     string            `json:"arg-type"`
		ElementType string            `json:"element-type"`
		Tag         string            `json:"tag"`
		Values      []string          `json:"values"`
		Members     []json.RawMessage `json:"members"`
		Variants    []struct{ Case, Type string }
	}
	if err := json.Unmarshal(reply, &entities); err != nil {
		return nil, fmt.Errorf("the daemon's schema: %w", err)
	}
	s := &Schema{types: map[string]*Type{}, commands: map[string]string{}}
	for _, e := range entities {
		switch e.Meta {
		case "command":
			s.commands[e.Name] = e.ArgType
			continue
		case "event":
			s.events = append(s.events, e.Name)
			continue
		}
		t := &Type{Meta: e.Meta, JSON: e.JSON, Values: e.Values, Element: e.ElementType, Tag: e.Tag}
		t.Variants = map[string]string{}
		for _, v := range e.Variants {
			t.Variants[v.Case] = v.Type
		}
		for _, raw := range e.Members {
			if err := t.member(raw); err != nil {
				return nil, fmt.Errorf("the daemon's schema, type '%s': %w", e.Name, err)
			}
		}
		s.types[e.Name] = t
	}
	slices.Sort(s.events)
	return s, nil
}

// member takes one element of "members": objects, alternates and newer daemons' enums have
// different ones.
func (t *Type) member(raw json.RawMessage) error {
	var m struct{ Name, Type string }
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	switch t.Meta {
	case "alternate":
		t.Choices = append(t.Choices, m.Type)
	case "enum": // the values again, with their features
	default:
		// An optional member has "default", which is null: only its presence counts.
		t.Members = append(t.Members, Member{m.Name, m.Type, strings.Contains(string(raw), `"default"`)})
	}
	return nil
}

// Commands returns the names of all commands, sorted.
func (s *Schema) Commands() []string {
	return slices.Sorted(maps.Keys(s.commands))
}

// Events returns the names of all events, sorted.
func (s *Schema) Events() []string { return s.events }

// Has tells whether there is a command of that name.
func (s *Schema) Has(command string) bool { _, ok := s.commands[command]; return ok }

// Type returns the type of that name; one without anything in it if there is none.
func (s *Schema) Type(name string) *Type {
	if t := s.types[name]; t != nil {
		return t
	}
	return &Type{}
}

// Members returns what may be given below prefix, a dotted path with its last dot or "", for a
// command: members of the object there, with those of the variants that given selects. given tells
// the text of an argument by its dotted key. It returns nil where no object can be.
func (s *Schema) Members(command, prefix string, given func(key string) string) []Member {
	if t, ok := s.at(command, prefix, given); ok {
		return s.all(t, prefix, given)
	}
	return nil
}

// OpenTag is the member of the object at prefix that decides which other members there are and is
// not given yet; "" if there is none.
func (s *Schema) OpenTag(command, prefix string, given func(key string) string) string {
	t, ok := s.at(command, prefix, given)
	at := prefix
	for ok && t.Tag != "" {
		chosen := given(at + t.Tag)
		if chosen == "" {
			return t.Tag
		}
		t, ok = s.object(t.Variants[chosen])
	}
	return ""
}

// at is the object that prefix leads to.
func (s *Schema) at(command, prefix string, given func(key string) string) (*Type, bool) {
	t, ok := s.object(s.commands[command])
	if !ok {
		return nil, false
	}
	at := ""
	for prefix != "" {
		part, rest, _ := strings.Cut(prefix, ".")
		m, ok := named(s.all(t, at, given), part)
		if !ok {
			return nil, false
		}
		at += part + "."
		next := s.Type(m.Type)
		if next.Meta == "array" {
			var index string
			index, rest, _ = strings.Cut(rest, ".")
			if _, err := strconv.ParseUint(index, 10, 31); err != nil {
				return nil, false
			}
			at += index + "."
			m.Type = next.Element
		}
		if t, ok = s.object(m.Type); !ok {
			return nil, false
		}
		prefix = rest
	}
	return t, true
}

// Find returns the argument that a dotted key means, its type being an array's element for a key
// that ends in an index.
func (s *Schema) Find(command, key string, given func(key string) string) (Member, bool) {
	prefix, last := "", key
	if i := strings.LastIndexByte(key, '.'); i >= 0 {
		prefix, last = key[:i+1], key[i+1:]
	}
	if _, err := strconv.ParseUint(last, 10, 31); err == nil && prefix != "" {
		m, ok := s.Find(command, strings.TrimSuffix(prefix, "."), given)
		if t := s.Type(m.Type); ok && t.Meta == "array" {
			m.Type = t.Element
			return m, true
		}
		return Member{}, false
	}
	return named(s.Members(command, prefix, given), last)
}

func named(l []Member, name string) (Member, bool) {
	for _, m := range l {
		if m.Name == name {
			return m, true
		}
	}
	return Member{}, false
}

// all are the members of an object with those of its chosen variant; at is the path of the object.
func (s *Schema) all(t *Type, at string, given func(string) string) []Member {
	l := slices.Clone(t.Members)
	if t.Tag == "" {
		return l
	}
	if v, ok := s.object(t.Variants[given(at+t.Tag)]); ok {
		l = append(l, s.all(v, at, given)...)
	}
	return l
}

// object returns the object that a value of the type may be: the type itself, or the choice of an
// alternate.
func (s *Schema) object(name string) (*Type, bool) {
	t := s.Type(name)
	switch t.Meta {
	case "object":
		return t, true
	case "alternate":
		for _, c := range t.Choices {
			if o, ok := s.object(c); ok {
				return o, true
			}
		}
	}
	return nil, false
}

// Object tells whether a value of the type may be an object, whose members are given by dotted
// keys, and whether it may be something else.
func (s *Schema) Object(name string) (object, other bool) {
	_, object = s.object(name)
	return object, s.Type(name).Meta != "object"
}

// Values are the words that may stand for a value of the type, as far as the schema knows: those of
// an enum, true and false, null.
func (s *Schema) Values(name string) []string {
	t := s.Type(name)
	switch {
	case t.Meta == "enum":
		return slices.Sorted(slices.Values(t.Values))
	case t.JSON == "boolean":
		return []string{"false", "true"}
	case t.JSON == "null":
		return []string{"null"}
	case t.Meta == "alternate":
		var l []string
		for _, c := range t.Choices {
			l = append(l, s.Values(c)...)
		}
		return l
	}
	return nil
}

// NodeRef tells whether a value of the type names a node or defines one.
func (s *Schema) NodeRef(name string) bool {
	t := s.Type(name)
	o, ok := s.object(name)
	return t.Meta == "alternate" && s.offers(t, "string") && ok && o.Tag == "driver"
}

// offers tells whether a choice of an alternate is that builtin.
func (s *Schema) offers(t *Type, json string) bool {
	return slices.ContainsFunc(t.Choices, func(c string) bool { return s.Type(c).JSON == json })
}

// Describe says in a few words what a value of the type is.
func (s *Schema) Describe(name string) string {
	t := s.Type(name)
	switch t.Meta {
	case "builtin":
		if t.JSON == "int" {
			return "integer"
		}
		return t.JSON
	case "enum":
		return strings.Join(t.Values, "|")
	case "array":
		return "list of " + s.Describe(t.Element)
	case "alternate":
		if s.NodeRef(name) {
			if s.offers(t, "null") {
				return "node name, null or definition"
			}
			return "node name or definition"
		}
		var l []string
		for _, c := range t.Choices {
			l = append(l, s.Describe(c))
		}
		return strings.Join(l, " or ")
	}
	return t.Meta
}
