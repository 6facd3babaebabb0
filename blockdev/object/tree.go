package object

import (
	"fmt"
	"strings"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

// node is an object of the tree, made for one question.
type node struct {
	typ  string
	kids []child
	g    *Group // of an iothread
}

type child struct {
	name string
	n    *node
}

func (r *Registry) tree() *node {
	objects, devices := &node{typ: "container"}, &node{typ: "container"}
	r.mu.Lock()
	for _, g := range r.groups {
		objects.kids = append(objects.kids, child{g.id, &node{typ: "iothread", g: g}})
	}
	r.mu.Unlock()
	for _, c := range r.chardevs() {
		devices.kids = append(devices.kids, child{c.Label, &node{typ: "chardev-" + c.Kind}})
	}
	return &node{typ: "container", kids: []child{{"objects", objects}, {"chardevs", devices}}}
}

// notFound is the error for a path or type that does not exist.
type notFound struct{ what, name string }

func (e *notFound) Error() string    { return fmt.Sprintf("%s '%s' not found", e.what, e.name) }
func (e *notFound) QMPClass() string { return "DeviceNotFound" }

// resolve finds the object at an absolute path, or at a partial one that fits just one object.
func (r *Registry) resolve(path string) (*node, error) {
	root := r.tree()
	parts := strings.FieldsFunc(path, func(c rune) bool { return c == '/' })
	if strings.HasPrefix(path, "/") {
		if n := root.below(parts); n != nil {
			return n, nil
		}
		return nil, &notFound{"Device", path}
	}
	var found []*node
	root.each(func(n *node) {
		if m := n.below(parts); m != nil && len(parts) > 0 {
			found = append(found, m)
		}
	})
	switch len(found) {
	case 0:
		return nil, &notFound{"Device", path}
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("Path '%s' does not uniquely identify an object", path)
}

func (n *node) below(parts []string) *node {
	for _, p := range parts {
		var next *node
		for _, k := range n.kids {
			if k.name == p {
				next = k.n
			}
		}
		if n = next; n == nil {
			return nil
		}
	}
	return n
}

func (n *node) each(f func(*node)) {
	f(n)
	for _, k := range n.kids {
		k.n.each(f)
	}
}

var iothreadProperties = []*types.ObjectPropertyInfo{{Name: "type", Type: "string"}, {Name: "thread-pool-max", Type: "int"}}

func properties(typ string) []*types.ObjectPropertyInfo {
	if typ == "iothread" {
		return iothreadProperties
	}
	return iothreadProperties[:1]
}

// List describes the properties and children of an object (qom-list).
func (r *Registry) List(path string) ([]*types.ObjectPropertyInfo, error) {
	n, err := r.resolve(path)
	if err != nil {
		return nil, err
	}
	out := append([]*types.ObjectPropertyInfo(nil), properties(n.typ)...)
	for _, k := range n.kids {
		out = append(out, &types.ObjectPropertyInfo{Name: k.name, Type: "child<" + k.n.typ + ">"})
	}
	return out, nil
}

// Get reads a property (qom-get).
func (r *Registry) Get(path, property string) (value.Value, error) {
	n, err := r.resolve(path)
	if err != nil {
		return nil, err
	}
	switch {
	case property == "type":
		return n.typ, nil
	case property == "thread-pool-max" && n.g != nil:
		return n.g.Max(), nil
	}
	for _, k := range n.kids {
		if k.name == property {
			return strings.TrimSuffix(path, "/") + "/" + property, nil
		}
	}
	return nil, fmt.Errorf("Property '%s.%s' not found", n.typ, property)
}

// Set changes a property (qom-set).
func (r *Registry) Set(path, property string, v value.Value) error {
	n, err := r.resolve(path)
	if err != nil {
		return err
	}
	switch {
	case property == "type":
		return fmt.Errorf("Property '%s.%s' is not writable", n.typ, property)
	case property == "thread-pool-max" && n.g != nil:
		return n.g.setMax(v)
	}
	return fmt.Errorf("Property '%s.%s' not found", n.typ, property)
}

// typeInfo is one type of objects.
type typeInfo struct {
	name, parent string
	abstract     bool
	creatable    bool // by object-add
}

// objectTypes lists the types, in the reference's order.
var objectTypes = []typeInfo{
	{name: "object", abstract: true},
	{name: "event-loop-base", parent: "object", abstract: true},
	{name: "chardev", parent: "object", abstract: true},
	{name: "chardev-fd", parent: "chardev", abstract: true},
	{name: "container", parent: "object"},
	{name: "iothread", parent: "event-loop-base", creatable: true},
	{name: "chardev-pipe", parent: "chardev-fd"},
	{name: "chardev-null", parent: "chardev"},
	{name: "chardev-ringbuf", parent: "chardev"},
	{name: "chardev-stdio", parent: "chardev-fd"},
	{name: "chardev-socket", parent: "chardev"},
	{name: "chardev-file", parent: "chardev-fd"},
	{name: "chardev-pty", parent: "chardev"},
}

func findType(name string) *typeInfo {
	for i := range objectTypes {
		if objectTypes[i].name == name {
			return &objectTypes[i]
		}
	}
	return nil
}

func (t *typeInfo) is(name string) bool {
	if name == "user-creatable" {
		return t.creatable
	}
	for ; t != nil; t = findType(t.parent) {
		if t.name == name {
			return true
		}
	}
	return false
}

// Types lists the types that are, or refine, implements ("": all), with abstract ones if asked for (qom-list-types).
func (r *Registry) Types(implements string, abstract bool) []*types.ObjectTypeInfo {
	out := []*types.ObjectTypeInfo{}
	for i := range objectTypes {
		t := &objectTypes[i]
		if implements != "" && !t.is(implements) || t.abstract && !abstract {
			continue
		}
		info := &types.ObjectTypeInfo{Name: t.name}
		if t.abstract {
			info.Abstract = &t.abstract
		}
		if t.parent != "" {
			info.Parent = &t.parent
		}
		out = append(out, info)
	}
	return out
}

// TypeProperties describes the properties that objects of a type have (qom-list-properties).
func (r *Registry) TypeProperties(typ string) ([]*types.ObjectPropertyInfo, error) {
	if findType(typ) == nil {
		return nil, &notFound{"Class", typ}
	}
	return properties(typ), nil
}
