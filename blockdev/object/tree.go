package object

import (
	"fmt"
	"slices"
	"strings"

	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// node is an object of the tree, made for one question.
type node struct {
	typ  string
	kids []child
	obj  object // nil for containers and devices
}

type child struct {
	name string
	n    *node
}

func (r *Registry) tree() *node {
	objects, devices := &node{typ: "container"}, &node{typ: "container"}
	r.mu.Lock()
	for _, x := range r.objects {
		objects.kids = append(objects.kids, child{x.id, &node{typ: x.typ(), obj: x.object}})
	}
	r.mu.Unlock()
	for _, c := range r.chardevs() {
		devices.kids = append(devices.kids, child{c.Label, &node{typ: "chardev-" + c.Kind}})
	}
	return &node{typ: "container", kids: []child{{"objects", objects}, {"chardevs", devices}}}
}

// notFound is the error for a path or type that does not exist.
func notFound(what, name string) error {
	return blk.WithClass(fmt.Errorf("%s '%s' not found", what, name), "DeviceNotFound")
}

// resolve finds the object at an absolute path, or at a partial one that fits just one object.
func (r *Registry) resolve(path string) (*node, error) {
	root := r.tree()
	parts := strings.FieldsFunc(path, func(c rune) bool { return c == '/' })
	if strings.HasPrefix(path, "/") {
		if n := root.below(parts); n != nil {
			return n, nil
		}
		return nil, notFound("Device", path)
	}
	var found []*node
	root.each(func(n *node) {
		if m := n.below(parts); m != nil && len(parts) > 0 {
			found = append(found, m)
		}
	})
	switch len(found) {
	case 0:
		return nil, notFound("Device", path)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("Path '%s' does not uniquely identify an object", path)
}

func (n *node) below(parts []string) *node {
	for _, p := range parts {
		i := slices.IndexFunc(n.kids, func(k child) bool { return k.name == p })
		if i < 0 {
			return nil
		}
		n = n.kids[i].n
	}
	return n
}

func (n *node) each(f func(*node)) {
	f(n)
	for _, k := range n.kids {
		k.n.each(f)
	}
}

// typeProperties are the properties of each type, beyond "type", in QEMU's order.
var typeProperties = map[string][]*types.ObjectPropertyInfo{
	"authz-list":      infos("string", "policy:QAuthZListPolicy", "rules:QAuthZListRule"),
	"authz-list-file": infos("string", "filename", "refresh:bool"),
	"authz-simple":    infos("string", "identity"),
	"event-loop-base": infos("int", loopProperties...),
	"iothread":        infos("int", slices.Concat(loopProperties, pollProperties)...),
	"secret_common":   secretCommon,
	"secret":          append(secretCommon[:len(secretCommon):len(secretCommon)], infos("string", "file", "data")...),
	"secret_keyring":  append(secretCommon[:len(secretCommon):len(secretCommon)], infos("int32_t", "serial")...),
	"throttle-group": infos("int", "x-bps-write-max-length", "x-iops-total-max-length", "x-iops-size", "limits:ThrottleLimits",
		"x-bps-total", "x-iops-read-max-length", "x-bps-write", "x-iops-write-max-length", "x-bps-read-max", "x-iops-read-max",
		"x-bps-total-max", "x-bps-read-max-length", "x-iops-read", "x-bps-read", "x-bps-write-max", "x-iops-total-max",
		"x-iops-total", "x-iops-write", "x-bps-total-max-length", "x-iops-write-max"),
	"tls-creds":      tlsCommon,
	"tls-creds-psk":  append(tlsCommon[:len(tlsCommon):len(tlsCommon)], infos("string", "username", "loaded:bool")...),
	"tls-creds-x509": append(tlsCommon[:len(tlsCommon):len(tlsCommon)], infos("bool", "sanity-check", "passwordid:string", "loaded")...),
}

var tlsCommon = infos("string", "endpoint:QCryptoTLSCredsEndpoint", "dir", "verify-peer:bool", "priority")

var secretCommon = infos("string", "iv", "keyid", "loaded:bool", "format:QCryptoSecretFormat")

// infos describes properties called NAME or NAME:TYPE; of type typ if they do not say.
func infos(typ string, names ...string) (out []*types.ObjectPropertyInfo) {
	for _, n := range names {
		name, own, _ := strings.Cut(n, ":")
		if own == "" {
			own = typ
		}
		out = append(out, &types.ObjectPropertyInfo{Name: name, Type: own})
	}
	return out
}

func properties(typ string) []*types.ObjectPropertyInfo {
	return append([]*types.ObjectPropertyInfo{{Name: "type", Type: "string"}}, typeProperties[typ]...)
}

// has tells whether objects of a type have a property, beyond "type".
func has(typ, property string) bool {
	return slices.ContainsFunc(typeProperties[typ], func(p *types.ObjectPropertyInfo) bool { return p.Name == property })
}

// List describes the properties and children of an object (qom-list).
func (r *Registry) List(path string) ([]*types.ObjectPropertyInfo, error) {
	n, err := r.resolve(path)
	if err != nil {
		return nil, err
	}
	out := properties(n.typ)
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
	if property == "type" {
		return n.typ, nil
	}
	if n.obj != nil && has(n.typ, property) {
		v, err := n.obj.get(property)
		if err == errNotReadable {
			return nil, fmt.Errorf("Property '%s.%s' is not readable", n.typ, property)
		}
		return v, err
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
	err = errReadOnly
	if property != "type" {
		if n.obj == nil || !has(n.typ, property) {
			return fmt.Errorf("Property '%s.%s' not found", n.typ, property)
		}
		err = n.obj.set(property, v)
	}
	if err == errReadOnly {
		return fmt.Errorf("Property '%s.%s' is not writable", n.typ, property)
	}
	return err
}

// typeInfo is one type of objects.
type typeInfo struct {
	name, parent string
	abstract     bool
	creatable    bool // by object-add
}

// objectTypes lists the types, in QEMU's order.
var objectTypes = []typeInfo{
	{name: "object", abstract: true},
	{name: "authz", parent: "object", abstract: true},
	{name: "authz-list", parent: "authz", creatable: true},
	{name: "authz-list-file", parent: "authz", creatable: true},
	{name: "authz-simple", parent: "authz", creatable: true},
	{name: "event-loop-base", parent: "object", abstract: true},
	{name: "chardev", parent: "object", abstract: true},
	{name: "chardev-fd", parent: "chardev", abstract: true},
	{name: "secret_common", parent: "object", abstract: true, creatable: true},
	{name: "container", parent: "object"},
	{name: "iothread", parent: "event-loop-base", creatable: true},
	{name: "secret", parent: "secret_common", creatable: true},
	{name: "chardev-pipe", parent: "chardev-fd"},
	{name: "chardev-null", parent: "chardev"},
	{name: "chardev-ringbuf", parent: "chardev"},
	{name: "chardev-stdio", parent: "chardev-fd"},
	{name: "chardev-socket", parent: "chardev"},
	{name: "chardev-file", parent: "chardev-fd"},
	{name: "chardev-pty", parent: "chardev"},
	{name: "secret_keyring", parent: "secret_common", creatable: true},
	{name: "throttle-group", parent: "object", creatable: true},
	{name: "tls-creds", parent: "object", abstract: true},
	{name: "tls-creds-psk", parent: "tls-creds", creatable: true},
	{name: "tls-creds-x509", parent: "tls-creds", creatable: true},
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

// Types lists the types that are, or refine, implements ("": all), with abstract ones if asked for
// (qom-list-types).
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
		return nil, notFound("Class", typ)
	}
	return properties(typ), nil
}
