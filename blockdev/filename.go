package blockdev

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/value"
)

// maxName is the longest file name that is shown, in bytes; longer ones end in "...".
const maxName = 4095

// nodeName is how a node is named in queries and image headers. Immutable.
type nodeName struct {
	gen      uint64 // TreeGeneration that it was made at
	auto     string // autoName that it was made with
	plain    string // a name that opens an equal node; "" if there is none
	options  *optionTree
	filename string // plain, or "json:" and options
}

// optionTree are the options that open an equal node, in the order in which they are printed.
// Trees of children are shared.
type optionTree struct{ members []optionMember }

type optionMember struct {
	name    string
	encoded []byte        // or
	sub     *optionTree   // an object, or
	list    []*optionTree // objects
}

// add puts a member where QEMU's hash table would have it.
func (t *optionTree) add(m optionMember) {
	b := value.Bucket(m.name)
	i := 0
	for i < len(t.members) && value.Bucket(t.members[i].name) < b {
		i++
	}
	t.members = slices.Insert(t.members, i, m)
}

// append encodes t but stops soon after b is longer than limit.
func (t *optionTree) append(b []byte, limit int) []byte {
	b = append(b, '{')
	for i := range t.members {
		if len(b) > limit {
			return b
		}
		if i > 0 {
			b = append(b, ", "...)
		}
		m := &t.members[i]
		b = append(value.AppendString(b, m.name), ": "...)
		switch {
		case m.sub != nil:
			b = m.sub.append(b, limit)
		case m.list != nil:
			b = appendList(b, m.list, limit)
		default:
			b = append(b, m.encoded...)
		}
	}
	return append(b, '}')
}

func appendList(b []byte, l []*optionTree, limit int) []byte {
	b = append(b, '[')
	for i, t := range l {
		if len(b) > limit {
			return b
		}
		if i > 0 {
			b = append(b, ", "...)
		}
		b = t.append(b, limit)
	}
	return append(b, ']')
}

// names tells how nodes are named in queries and in the headers of images, and keeps that in their
// records.
type names struct {
	*catalog
	*records
}

// namer names nodes.
type namer struct {
	m *names
	graph.View
	bare bool                      // filters are left out
	made map[*graph.Node]*nodeName // nil: names are kept in the records
}

func (t *names) namer() namer { return namer{m: t, View: graph.Now} }

// Target is the node below e that counts.
func (v namer) Target(e *graph.Edge) *graph.Node {
	n := v.View.Target(e)
	if v.bare {
		n = v.SkipFilters(n)
	}
	return n
}

// Filename is the name of n as queries show it. No I/O, no waiting.
func (t *names) Filename(n *graph.Node) string { return t.name(n).filename }

// HeaderName is how the header of an image names n as its backing file, and the format. Filters
// change nothing of what is read: they are left out, wherever they are, so that whoever opens the
// image needs the files and nothing else. Errors: images cannot name what n is.
func (t *names) HeaderName(look graph.View, n *graph.Node) (name, format string, err error) {
	v := namer{t, look, true, map[*graph.Node]*nodeName{}}
	gen, r := n.TreeGeneration(), t.record(n)
	n = v.SkipFilters(n)
	if err := v.canName(n); err != nil {
		return "", "", err
	}
	name = v.name(n).filename
	r.header.Store(&headerName{gen, name})
	return name, n.DriverName(), nil
}

// canName tells why the header of an image cannot name n and what its data lie in.
func (v namer) canName(n *graph.Node) error {
	if d := v.m.driverOf(n); d == nil || d.ForImages == nil {
		return errNotNamed(n.DriverName())
	}
	for _, e := range v.Children(n) {
		if e.Role()&perm.COW != 0 {
			continue
		}
		if err := v.canName(v.Target(e)); err != nil {
			return err
		}
	}
	return nil
}

// errNotNamed is the error of a header that would name a driver that headers cannot name.
func errNotNamed(driver string) error {
	return fmt.Errorf("An image cannot name a node of the driver '%s' as its backing file", driver)
}

// isHeaderName tells whether an image's header was made to call n by that name.
func (t *names) isHeaderName(n *graph.Node, name string) bool {
	r := t.record(n).header.Load()
	if r == nil {
		return false
	}
	if n.TreeGeneration() == r.gen {
		return r.name == name
	}
	now, _, err := t.HeaderName(graph.Now, n)
	return err == nil && now == name
}

// BackingOverridden tells whether opening n's image anew, without options, would give another
// backing file, or may do so.
func (t *names) BackingOverridden(n *graph.Node) bool {
	return t.namer().overridden(autoName(n, t.record(n)), n.Backing())
}

func (v namer) overridden(auto string, backing *graph.Edge) bool {
	if backing == nil {
		return auto != ""
	}
	n := v.Target(backing)
	return auto != v.name(n).filename && (v.made != nil || !v.m.isHeaderName(n, auto))
}

// name is the name of n, made anew if something below changed since it was made.
func (t *names) name(n *graph.Node) *nodeName { return t.nameOf(n, t.record(n)) }

func (t *names) nameOf(n *graph.Node, r *record) *nodeName {
	gen := n.TreeGeneration() // before what it stands for
	auto := autoName(n, r)
	if old := r.name.Load(); old != nil && old.gen == gen && old.auto == auto {
		return old
	}
	fresh := t.namer().make(n, auto)
	fresh.gen, fresh.auto = gen, auto
	r.name.Store(fresh)
	return fresh
}

func (v namer) name(n *graph.Node) *nodeName {
	if v.made == nil {
		return v.m.name(n)
	}
	name := v.made[n]
	if name == nil {
		name = v.make(n, autoName(n, v.m.record(n)))
		v.made[n] = name
	}
	return name
}

func (v namer) make(n *graph.Node, auto string) *nodeName {
	kids := v.Children(n)
	if n.Options().Implicit && len(kids) == 1 {
		below := *v.name(v.Target(kids[0]))
		return &below
	}
	d := v.m.driverOf(n)
	t := &optionTree{}
	t.add(optionMember{name: "driver", encoded: value.AppendString(nil, n.DriverName())})
	needJSON := false
	var u any
	if d != nil && n.Options().Canonical != nil {
		u = n.Options().Canonical.U
	}
	if u != nil && d.Strong != nil {
		d.Strong(u, func(name string, v value.Value) {
			needJSON = true
			t.add(optionMember{name: name, encoded: value.Append(nil, v)})
		})
	}
	backing := v.Backing(n)
	over := v.overridden(auto, backing)
	v.addChildren(t, d, kids, func(e *graph.Edge) bool { return e != backing || over })
	if over && backing == nil {
		t.add(optionMember{name: "backing", encoded: []byte("null")})
	}
	name := &nodeName{options: t}
	name.plain = v.plain(n, d, u, needJSON || over)
	name.filename = name.plain
	if name.plain == "" {
		name.filename = t.filename()
	}
	return name
}

// addChildren adds the options of those children that count. Those that are elements of a list are
// one after the other in it, also where numbers in between are gone.
func (v namer) addChildren(t *optionTree, d *driver.Any, kids []*graph.Edge, counts func(*graph.Edge) bool) {
	var list []*optionTree
	for _, e := range kids { // newest first
		if !counts(e) {
			continue
		}
		o := v.name(v.Target(e)).options
		if d != nil && d.Listed(e.ChildName()) {
			list = append(list, o)
		} else {
			t.add(optionMember{name: e.ChildName(), sub: o})
		}
	}
	if list != nil {
		slices.Reverse(list)
		t.add(optionMember{name: d.List, list: list})
	}
}

// plain is the plain name of a node, "" if it has none.
func (v namer) plain(n *graph.Node, d *driver.Any, u any, needJSON bool) string {
	switch {
	case d == nil && n.Kind() == graph.Filter:
		if e := v.File(n); e != nil { // a filter of a job
			return v.name(v.Target(e)).filename
		}
	case d != nil && d.Filename != nil && (u != nil || n.Kind() == graph.Filter):
		name := d.Filename(u, func(child string) driver.Names {
			for _, e := range v.Children(n) {
				if e.ChildName() == child {
					below := v.name(v.Target(e))
					return driver.Names{Shown: below.filename, Plain: below.plain}
				}
			}
			return driver.Names{}
		})
		if len(name) > maxName {
			return "" // that of a child may be in it twice, and so on
		}
		return name
	}
	if f := v.File(n); f != nil && v.m.isProtocol(v.Target(f)) && n.Kind() != graph.Filter && !needJSON {
		return v.name(v.Target(f)).plain
	}
	return ""
}

// isProtocol tells whether a plain file name can open a node of n's driver.
func (c *catalog) isProtocol(n *graph.Node) bool {
	d := c.driverOf(n)
	return n.Kind() == graph.Protocol || d != nil && d.LikeProtocol
}

func (t *optionTree) filename() string {
	const prefix = "json:"
	b := t.append([]byte(prefix), maxName)
	if len(b) > maxName {
		b = append(b[:maxName-3], "..."...)
	}
	return string(b)
}

// absolute makes a file name that n's image names independent of where n's image lies.
func (t *names) absolute(n *graph.Node, name string) (string, error) {
	if name == "" || name[0] == '/' || driver.HasProtocol(name) {
		return name, nil
	}
	at := n
	for e := at.File(); e != nil; e = at.File() {
		at = e.Node()
	}
	if d := t.driverOf(at); d != nil && d.NoFolder != "" {
		return "", fmt.Errorf("Cannot generate a base directory for %s nodes", d.NoFolder)
	}
	base := t.name(at).plain
	if base == "" {
		return "", fmt.Errorf("Cannot generate a base directory for %s nodes", at.DriverName())
	}
	return folder(base) + name, nil
}

// folder is the folder of a file name, with its protocol and the last slash; "" if it has neither.
func folder(name string) string {
	protocol := 0
	if driver.HasProtocol(name) {
		protocol = strings.IndexByte(name, ':') + 1
	}
	return name[:max(protocol, strings.LastIndexByte(name, '/')+1)]
}

// backingFile is the backing file that n's image names, and its format; both empty if there is
// none.
func backingFile(n *graph.Node) (name, format string) {
	if image, ok := n.Driver().(graph.Backed); ok {
		return image.BackingFile()
	}
	return "", ""
}

// FindBacking is the node of top's backing chain whose image has that file name, or nil: the name
// as the overlay's header or a query shows it, or another path to the same file. It looks at the
// file system and so may block.
func (t *names) FindBacking(top *graph.Node, file string) *graph.Node {
	for cur := top.SkipFilters(); cur.Backing() != nil; {
		below := cur.Backing().Node().SkipFilters()
		name, _ := backingFile(cur)
		full, _ := t.absolute(cur, name)
		switch {
		case t.BackingOverridden(cur):
			if file == t.Filename(below) {
				return below
			}
		case driver.HasProtocol(file) || driver.HasProtocol(name):
			if file == name || file == full {
				return below
			}
		default:
			if abs, err := t.absolute(cur, file); err == nil && samePath(abs, full) {
				return below
			}
		}
		cur = below
	}
	return nil
}

// samePath tells whether two names lead to one file that exists.
func samePath(a, b string) bool {
	a, errA := canonical(a)
	b, errB := canonical(b)
	return errA == nil && errB == nil && a == b
}

func canonical(name string) (string, error) {
	abs, err := filepath.Abs(name)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}
