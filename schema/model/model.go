package model

import "slices"

// Kind tells what sort of type a Type is.
type Kind uint8

// The kinds of types.
const (
	Builtin Kind = iota
	Enum
	Array
	Object
	Alternate
)

// Type is a resolved QAPI type.
type Type struct {
	Name     string
	Kind     Kind
	File     string // schema file it is defined in; empty for builtins and arrays
	Line     int
	Doc      Doc
	Features []string
	Implicit bool // made for inline data of a command or event, or an inline base

	Elem     *Type     // Array: type of the elements
	Values   []Value   // Enum: in order of definition
	Base     *Type     // Object: nil if none
	Local    []*Member // Object: members without those of Base; Alternate: the alternatives
	Tag      *Member   // Object: the discriminator; nil unless it is a union
	Variants []Variant // Object: in order of definition
}

// Value is one value of an enum.
type Value struct {
	Name     string
	Features []string
}

// Member is a member of an object, or an alternative of an alternate.
type Member struct {
	Name     string
	Type     *Type
	Optional bool
	Features []string
	Doc      string
}

// Variant is a branch of a union: when the tag has the value Case, the members of
// Type are there too. A tag value without Variant adds no members.
type Variant struct {
	Case string
	Type *Type
}

// Members returns all members of an object outside its variants, those of the base first.
func (t *Type) Members() []*Member {
	if t.Base == nil {
		return t.Local
	}
	return slices.Concat(t.Base.Members(), t.Local)
}

// Variant returns the type of a branch, or nil if that branch adds nothing.
func (t *Type) Variant(value string) *Type {
	for _, v := range t.Variants {
		if v.Case == value {
			return v.Type
		}
	}
	return nil
}

// Entity is what commands and events have in common.
type Entity struct {
	Name     string
	File     string
	Line     int
	Doc      Doc
	Features []string
	Arg      *Type // an Object, or nil if it takes no arguments or has no data
}

// Command is a QMP command.
type Command struct {
	Entity
	Ret      *Type // nil if it returns nothing
	Boxed    bool
	AllowOOB bool
}

// Event is a QMP event.
type Event struct{ Entity }

// Schema is a checked schema.
type Schema struct {
	Files    []string // in order of first inclusion
	Types    []*Type  // defined types in order of definition; no builtins, no arrays, implicit ones included
	Commands []*Command
	Events   []*Event
	Entities []any // *Command and *Event, file by file in order of definition

	types map[string]*Type
}

// Type looks a type up by its QAPI name; nil if there is none.
func (s *Schema) Type(name string) *Type { return s.types[name] }

// Command looks a command up; nil if there is none.
func (s *Schema) Command(name string) *Command {
	for _, c := range s.Commands {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// jsonTypes are the builtin types and how their values look in JSON.
var jsonTypes = map[string]string{
	"str": "string", "int": "int", "number": "number", "bool": "boolean", "null": "null", "any": "value",
	"int8": "int", "int16": "int", "int32": "int", "int64": "int",
	"uint8": "int", "uint16": "int", "uint32": "int", "uint64": "int", "size": "int",
}

// JSONType is the shape of a type's values in JSON: string, int, number, boolean,
// null, value, object, array; empty for alternates.
func (t *Type) JSONType() string {
	switch t.Kind {
	case Builtin:
		return jsonTypes[t.Name]
	case Enum:
		return "string"
	case Array:
		return "array"
	case Object:
		return "object"
	}
	return ""
}
