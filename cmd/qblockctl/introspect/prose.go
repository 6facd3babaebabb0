package introspect

import (
	"encoding/json"
	"strconv"
	"strings"
)

// Prose explains one command and its arguments; it comes from a JSON Schema with descriptions,
// since the live schema has none.
type Prose struct{ root, at map[string]any }

// NewProse reads a command's JSON Schema. It returns one that knows nothing if text is none.
func NewProse(text []byte) *Prose {
	p := &Prose{}
	_ = json.Unmarshal(text, &p.root)
	p.at = p.root
	return p
}

// Text is the description of the command, or of the argument that the prose is of.
func (p *Prose) Text() string {
	text, _ := p.at["description"].(string)
	return text
}

// Of returns the prose of the argument with that dotted key, as Schema.Find takes it.
func (p *Prose) Of(key string, given func(key string) string) *Prose {
	cur, at := p.at, ""
	for _, part := range strings.Split(key, ".") {
		if _, err := strconv.ParseUint(part, 10, 31); err == nil {
			cur, _ = p.deref(cur)["items"].(map[string]any)
		} else {
			cur = p.member(cur, at, part, given)
		}
		at += part + "."
	}
	return &Prose{p.root, cur}
}

// deref follows $ref.
func (p *Prose) deref(s map[string]any) map[string]any {
	for range 8 {
		ref, ok := s["$ref"].(string)
		if !ok {
			return s
		}
		defs, _ := p.root["$defs"].(map[string]any)
		s, _ = defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
	}
	return s
}

// member looks for a member in a schema, its choices, and the branch that given selects.
func (p *Prose) member(s map[string]any, at, name string, given func(string) string) map[string]any {
	s = p.deref(s)
	if props, ok := s["properties"].(map[string]any); ok {
		if m, ok := props[name].(map[string]any); ok {
			return m
		}
	}
	for _, list := range []string{"anyOf", "oneOf", "allOf"} {
		branches, _ := s[list].([]any)
		for _, b := range branches {
			branch, _ := b.(map[string]any)
			if cond, ok := branch["if"].(map[string]any); ok {
				if !holds(cond, at, given) {
					continue
				}
				branch, _ = branch["then"].(map[string]any)
			}
			if m := p.member(branch, at, name, given); m != nil {
				return m
			}
		}
	}
	return nil
}

// holds tells whether the arguments meet the condition of a branch, one member with one value, or
// may do so yet: while that member is not given, what all branches have is explained by the first.
func holds(cond map[string]any, at string, given func(string) string) bool {
	props, _ := cond["properties"].(map[string]any)
	for name, v := range props {
		m, _ := v.(map[string]any)
		if is := given(at + name); is != "" && is != m["const"] {
			return false
		}
	}
	return true
}
