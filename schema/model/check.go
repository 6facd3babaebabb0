package model

import (
	"fmt"
	"slices"
	"strings"
)

// Names that do not keep to QAPI's rules but are part of the interface
// (qapi-code-gen: lower case with hyphens; types in CamelCase; no boolean or scalar
// replies from commands).
var (
	oddCommands = map[string]bool{"block_resize": true, "qmp_capabilities": true}
	oddReturns  = map[string]bool{"qom-get": true, "ringbuf-read": true}
	oddMembers  = map[string]bool{
		"BlockDeviceInfo": true, "BlockDeviceStats": true, "BlockDeviceTimedStats": true, "BlockInfo": true,
		"BlockdevAioOptions": true, "BlockdevDriver": true, "BlkdebugEvent": true, "BlkdebugSetStateOptions": true,
		"ObjectType": true,
	}
)

// check looks at what can be judged only when everything is resolved.
func (b *builder) check() {
	for _, t := range b.Types {
		b.at = fmt.Sprintf("%s:%d", t.File, t.Line)
		if !t.Implicit && !isCamel(t.Name) {
			b.fail("the type name '%s' is not in CamelCase", t.Name)
		}
		switch t.Kind {
		case Enum:
			b.checkEnum(t)
		case Object:
			b.checkObject(t)
		case Alternate:
			b.checkAlternate(t)
		}
	}
	for _, c := range b.Commands {
		b.at = fmt.Sprintf("%s:%d", c.File, c.Line)
		if !isLower(c.Name) && !oddCommands[c.Name] {
			b.fail("the command name '%s' is not in lower case with hyphens", c.Name)
		}
		if c.Arg != nil && c.Arg.Kind != Object {
			b.fail("the arguments of '%s' are not an object", c.Name)
		}
		if c.Ret != nil && !oddReturns[c.Name] {
			t := c.Ret
			if t.Kind == Array {
				t = t.Elem
			}
			if t.Kind != Object {
				b.fail("'%s' returns neither an object nor objects", c.Name)
			}
		}
		b.checkDocs(c.Name, c.Doc, c.Arg)
	}
	for _, e := range b.Events {
		b.at = fmt.Sprintf("%s:%d", e.File, e.Line)
		if strings.ToUpper(e.Name) != e.Name || !isLower(strings.ToLower(strings.ReplaceAll(e.Name, "_", "-"))) {
			b.fail("the event name '%s' is not in upper case with underscores", e.Name)
		}
		if e.Arg != nil && (e.Arg.Kind != Object || e.Arg.Tag != nil) {
			b.fail("the data of '%s' is not a plain object", e.Name)
		}
		b.checkDocs(e.Name, e.Doc, e.Arg)
	}
}

func (b *builder) checkEnum(t *Type) {
	seen := map[string]bool{}
	for _, v := range t.Values {
		if seen[v.Name] {
			b.fail("enum '%s' has the value '%s' twice", t.Name, v.Name)
		}
		seen[v.Name] = true
		if !isLower(v.Name) && !oddMembers[t.Name] {
			b.fail("the value '%s' of '%s' is not in lower case with hyphens", v.Name, t.Name)
		}
	}
	if len(t.Values) == 0 {
		b.fail("enum '%s' has no values", t.Name)
	}
	b.describesNoMore(t.Name, "", t.Doc.Members, seen)
}

// describesNoMore makes sure that a comment describes only what is there.
func (b *builder) describesNoMore(name, kind string, described map[string]string, there map[string]bool) {
	for k := range described {
		if !there[k] {
			b.fail("the comment above '%s' describes %s'%s', which is not there", name, kind, k)
		}
	}
}

func (b *builder) checkObject(t *Type) {
	depth := 0
	for base := t.Base; base != nil; base = base.Base {
		if depth++; depth > maxDepth || base.Kind != Object || base.Tag != nil {
			b.fail("'%s' cannot be the base of '%s'", base.Name, t.Name)
		}
	}
	b.checkMembers(t, t.Members())
	if t.Tag != nil {
		b.checkUnion(t)
	}
	b.checkDocs(t.Name, t.Doc, t)
}

func (b *builder) checkMembers(t *Type, ms []*Member) {
	seen := map[string]bool{}
	for _, m := range ms {
		if seen[m.Name] {
			b.fail("'%s' has the member '%s' twice", t.Name, m.Name)
		}
		seen[m.Name] = true
		if !isLower(m.Name) && !oddMembers[t.Name] {
			b.fail("the member '%s' of '%s' is not in lower case with hyphens", m.Name, t.Name)
		}
	}
}

// checkUnion resolves the discriminator and checks that the branches fit to it.
func (b *builder) checkUnion(t *Type) {
	name := t.Tag.Name
	t.Tag = nil
	for _, m := range t.Members() {
		if m.Name == name {
			t.Tag = m
		}
	}
	switch {
	case t.Tag == nil:
		b.fail("'%s' has no member '%s' to tell its branches apart", t.Name, name)
	case t.Tag.Type.Kind != Enum || t.Tag.Optional:
		b.fail("the discriminator '%s' of '%s' is not a mandatory enum", name, t.Name)
	case len(t.Variants) == 0:
		b.fail("'%s' has no branches", t.Name)
	}
	for _, v := range t.Variants {
		if !slices.ContainsFunc(t.Tag.Type.Values, func(k Value) bool { return k.Name == v.Case }) {
			b.fail("branch '%s' of '%s' is not a value of '%s'", v.Case, t.Name, t.Tag.Type.Name)
		}
		if v.Type.Kind != Object || v.Type.Tag != nil {
			b.fail("branch '%s' of '%s' is not a struct", v.Case, t.Name)
		}
		b.checkMembers(t, append(t.Members(), v.Type.Members()...))
	}
}

// checkAlternate makes sure that the JSON type of a value decides for an alternative.
func (b *builder) checkAlternate(t *Type) {
	seen := map[string]bool{}
	for _, m := range t.Local {
		j := m.Type.JSONType()
		switch {
		case m.Optional || len(m.Features) > 0:
			b.fail("the alternative '%s' of '%s' is optional or has features", m.Name, t.Name)
		case j != "object" && j != "string" && j != "null":
			// Numbers and booleans would clash with strings on the command line.
			b.fail("the alternative '%s' of '%s' is neither object nor string nor null", m.Name, t.Name)
		case seen[j]:
			b.fail("'%s' has two alternatives that are a JSON %s", t.Name, j)
		}
		seen[j] = true
	}
	b.checkDocs(t.Name, t.Doc, t)
}

// checkDocs makes sure that a comment describes only what exists, and all of that.
func (b *builder) checkDocs(name string, doc Doc, t *Type) {
	own := map[string]bool{}
	if t != nil {
		for _, m := range t.Local {
			own[m.Name] = true
		}
		if t.Name == name || t.Implicit {
			for k := range own {
				if doc.Members[k] == "" {
					b.fail("the comment above '%s' does not describe '%s'", name, k)
				}
			}
		}
	}
	b.describesNoMore(name, "", doc.Members, own)
}

// checkFeatureDocs makes sure that each feature of a definition or its members is described.
func (b *builder) checkFeatureDocs(name string, features []string, t *Type, doc Doc) {
	have := map[string]bool{}
	for _, f := range features {
		have[f] = true
	}
	if t != nil {
		for _, m := range t.Local {
			for _, f := range m.Features {
				have[f] = true
			}
		}
	}
	for f := range have {
		if doc.Features[f] == "" {
			b.fail("the comment above '%s' does not describe the feature '%s'", name, f)
		}
	}
	b.describesNoMore(name, "the feature ", doc.Features, have)
}

func isCamel(s string) bool {
	return s[0] >= 'A' && s[0] <= 'Z' && !strings.ContainsAny(s, "-_. ")
}

func isLower(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; !(c >= 'a' && c <= 'z' || isDigit(c) || c == '-') {
			return false
		}
	}
	return s != "" && s[0] != '-'
}
