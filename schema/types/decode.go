package types

//lint:file-ignore U1000 what cmd/qapigen may call; which of it is used depends on the schema

import (
	"strconv"

	"qblockd/schema/value"
)

// Mode tells decoders where a value comes from.
type Mode uint8

const (
	// ModeQObject is for typed JSON: QMP, and JSON on the command line.
	ModeQObject Mode = iota
	// ModeKeyval is for KEY=VALUE lists on the command line: all scalars are strings.
	ModeKeyval
)

// ArgError says what is wrong with a value that a client gave, in QAPI's words.
type ArgError struct{ desc string }

// Error is the sentence for the client.
func (e *ArgError) Error() string { return e.desc }

// QMPClass is the error class on the wire.
func (e *ArgError) QMPClass() string { return "GenericError" }

// decoder walks a value in the order of the schema, depth first, and stops at the
// first fault. The functions below return false once err is set.
type decoder struct {
	mode    Mode
	stack   []frame
	buf     [4]frame // first storage of stack
	err     error
	tracing bool // note the order of visits
	again   bool // a member is unexpected: visit again, tracing, to see which to name
}

// frame is a container that is being visited.
type frame struct {
	name  string // its name in its parent; empty for list elements and the root
	dict  *value.Dict
	n     int   // members visited
	order []int // the same by index, if tracing

	list  value.List // if dict is nil
	index int        // list: the next element
}

// decode visits the value v at the root.
func decode[T any](v value.Value, m Mode, visit func(*decoder, string, *T) bool) (*T, error) {
	if dict, ok := v.(*value.Dict); ok && dict == nil {
		v = &value.Dict{}
	}
	root := frame{list: value.List{v}, index: rootIndex}
	d := decoder{mode: m}
	d.stack = append(d.buf[:0], root)
	t := new(T)
	if visit(&d, "", t) {
		return t, nil
	}
	if d.again {
		d = decoder{mode: m, tracing: true, stack: []frame{root}}
		visit(&d, "", t)
	}
	return nil, d.err
}

// rootIndex marks the frame that holds the root as its one element: it has no part in paths.
const rootIndex = -1

// args visits the arguments of a command; nil counts as none.
func args[T any](v *value.Dict, visit func(*decoder, string, *T) bool) (*T, error) {
	return decode(v, ModeQObject, visit)
}

// noArgs refuses arguments of a command that takes none.
func noArgs(v *value.Dict) error {
	if v.Len() == 0 {
		return nil
	}
	_, err := args(v, func(d *decoder, name string, p *struct{}) bool {
		return object(d, name, p, func(*decoder, *struct{}) bool { return true })
	})
	return err
}

func (d *decoder) top() *frame { return &d.stack[len(d.stack)-1] }

// peek finds the member called name of the innermost object, or the next element of
// the innermost list.
func (d *decoder) peek(name string) (value.Value, bool) {
	f := d.top()
	if f.dict != nil {
		return f.dict.Get(name)
	}
	if f.index == rootIndex {
		return f.list[0], true
	}
	return f.list[f.index], true
}

// take is peek, marks what it finds as visited, and words the fault if there is nothing.
func (d *decoder) take(name string) (value.Value, bool) {
	f := d.top()
	if f.dict == nil {
		if f.index == rootIndex {
			return f.list[0], true
		}
		f.index++
		return f.list[f.index-1], true
	}
	for i, m := range f.dict.Members() {
		if m.Name == name {
			f.n++
			if d.tracing {
				f.order = append(f.order, i)
			}
			return m.Value, true
		}
	}
	return nil, d.missing(name)
}

func (d *decoder) has(name string) bool {
	_, ok := d.top().dict.Get(name)
	return ok
}

// path is the full name of the member called name of the innermost container, as
// "a.b[0].c", on the command line "a.b.0.c".
func (d *decoder) path(name string) string {
	s := ""
	for i := len(d.stack) - 1; i >= 0; i-- {
		f := &d.stack[i]
		switch {
		case f.dict != nil:
			s = "." + name + s
		case f.index == rootIndex:
		case d.mode == ModeKeyval:
			s = "." + strconv.Itoa(f.index-1) + s
		default:
			s = "[" + strconv.Itoa(f.index-1) + "]" + s
		}
		name = f.name
	}
	if s == "" {
		return "<anonymous>"
	}
	if s[0] == '.' {
		return s[1:]
	}
	return s
}

func (d *decoder) fail(desc string) bool {
	d.err = &ArgError{desc}
	return false
}

func (d *decoder) missing(name string) bool {
	return d.fail("Parameter '" + d.path(name) + "' is missing")
}

func (d *decoder) badType(name, expected string) bool {
	return d.fail("Invalid parameter type for '" + d.path(name) + "', expected: " + expected)
}

func (d *decoder) badValue(name, expected string) bool {
	return d.fail("Parameter '" + d.path(name) + "' expects " + expected)
}

// last is the name of a thing without its path; list elements have none.
func last(name string) string {
	if name == "" {
		return "null"
	}
	return name
}

// opt visits a member that may be left out.
func opt[T any](d *decoder, name string, p **T, visit func(*decoder, string, *T) bool) bool {
	if !d.has(name) {
		return true
	}
	*p = new(T)
	return visit(d, name, *p)
}

// object visits an object: its members, then what is there beyond them.
func object[T any](d *decoder, name string, p *T, members func(*decoder, *T) bool) bool {
	v, ok := d.take(name)
	if !ok {
		return false
	}
	dict, ok := v.(*value.Dict)
	if !ok {
		return d.badType(name, "object")
	}
	d.stack = append(d.stack, frame{name: name, dict: dict})
	if !members(d, p) {
		return false
	}
	if f := d.top(); f.n < dict.Len() {
		if !d.tracing {
			d.again = true
			return false
		}
		return d.fail("Parameter '" + d.path(f.unexpected()) + "' is unexpected")
	}
	d.stack = d.stack[:len(d.stack)-1]
	return true
}

// list visits an array of scalars.
func list[T any](d *decoder, name string, p *[]T, elem func(*decoder, string, *T) bool) bool {
	v, ok := d.take(name)
	if !ok {
		return false
	}
	l, ok := v.(value.List)
	if !ok {
		return d.badType(name, "array")
	}
	*p = make([]T, len(l))
	d.stack = append(d.stack, frame{name: name, list: l})
	for i := range l {
		if !elem(d, "", &(*p)[i]) {
			return false
		}
	}
	d.stack = d.stack[:len(d.stack)-1]
	return true
}

// listPtr visits an array of objects or alternates.
func listPtr[T any](d *decoder, name string, p *[]*T, elem func(*decoder, string, *T) bool) bool {
	return list(d, name, p, func(d *decoder, name string, p **T) bool {
		*p = new(T)
		return elem(d, name, *p)
	})
}

// optList visits an array that may be left out; one that is there is never nil.
func optList[T any](d *decoder, name string, p *[]T, elem func(*decoder, string, *T) bool) bool {
	return !d.has(name) || list(d, name, p, elem)
}

// optListPtr is optList for objects and alternates.
func optListPtr[T any](d *decoder, name string, p *[]*T, elem func(*decoder, string, *T) bool) bool {
	return !d.has(name) || listPtr(d, name, p, elem)
}

// enum visits a value that must be one of a few.
func enum[T ~string](d *decoder, name string, p *T, values []T) bool {
	var s string
	if !visitStr(d, name, &s) {
		return false
	}
	for _, v := range values {
		if string(v) == s {
			*p = v
			return true
		}
	}
	return d.fail("Parameter '" + last(name) + "' does not accept value '" + s + "'")
}
