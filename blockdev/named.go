package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// namedOptions turns a file name into options, or, where the format has to be guessed, into the
// file alone. Of options in it that a user has not given but an image, those are left out that do
// not count.
func (c *catalog) namedOptions(
	ctx context.Context, name, format string, byImage bool,
) (*types.BlockdevOptions, *types.BlockdevRef, error) {
	if text, ok := strings.CutPrefix(name, "json:"); ok {
		return c.jsonOptions(ctx, text, format, byImage)
	}
	if format == "" {
		o, err := c.protocolOptions(ctx, name)
		return nil, &types.BlockdevRef{Definition: o}, err
	}
	d := c.drivers[types.BlockdevDriver(format)]
	if d == nil {
		return nil, nil, fmt.Errorf("Unknown driver '%s'", format)
	}
	if d.Kind == graph.Protocol {
		u, err := d.FromName(name)
		return &types.BlockdevOptions{Driver: d.Name, U: u}, nil, err
	}
	o, err := c.protocolOptions(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if d.FromFile != nil {
		return &types.BlockdevOptions{Driver: d.Name, U: d.FromFile(types.BlockdevRef{Definition: o})}, nil, nil
	}
	above := &value.Dict{} // a filter, which may lack other options
	above.Set("driver", format)
	above.Set("file", optionDict(o))
	o, err = types.DecodeBlockdevOptions(above, types.ModeQObject)
	return o, nil, err
}

// protocolOptions chooses the protocol for a file name, which may start with "PROTOCOL:".
func (c *catalog) protocolOptions(ctx context.Context, name string) (*types.BlockdevOptions, error) {
	return c.protocolAt(ctx, name, 1)
}

// protocolAt is protocolOptions of a name at that level within others.
func (c *catalog) protocolAt(ctx context.Context, name string, level int) (*types.BlockdevOptions, error) {
	d, device, err := c.pathDriver(ctx, name)
	if err != nil {
		return nil, err
	}
	if d == nil || !device && driver.HasProtocol(name) {
		prefix, _, _ := strings.Cut(name, ":")
		i := slices.IndexFunc(c.order, func(d *driver.Any) bool {
			return prefix != "" && (d.Prefix == prefix || slices.Contains(d.MorePrefixes, prefix))
		})
		if i < 0 {
			return nil, fmt.Errorf("Unknown protocol '%s'", prefix)
		}
		d = c.order[i]
	}
	var u any
	switch {
	case level > maxNameLevels:
		err = errNameTooLarge
	case d.FromNames != nil:
		u, err = d.FromNames(name, func(name string, image bool) (types.BlockdevRef, error) {
			o, err := c.protocolAt(ctx, name, level+1)
			if image {
				o = toBeGuessed(&types.BlockdevRef{Definition: o})
			}
			return types.BlockdevRef{Definition: o}, err
		})
	default:
		u, err = d.FromName(name)
	}
	if err != nil {
		return nil, err
	}
	return &types.BlockdevOptions{Driver: d.Name, U: u}, nil
}

// pathDriver is the driver for a path, nil if there is none, and tells whether it leads to a
// device. It blocks as long as the storage does, but no longer than ctx.
func (c *catalog) pathDriver(ctx context.Context, name string) (d *driver.Any, device bool, err error) {
	var mode fs.FileMode
	err = panics.Await(ctx, "a look at a file", func() { // which may get stuck in the kernel
		if st, err := os.Stat(name); err == nil {
			mode = st.Mode()
		}
	})
	if err != nil {
		return nil, false, err
	}
	i := slices.IndexFunc(c.order, func(d *driver.Any) bool { return d.TakesPath != nil && d.TakesPath(mode) })
	if i >= 0 {
		d = c.order[i]
	}
	return d, mode&fs.ModeDevice != 0, nil
}

// jsonOptions reads what follows "json:" in a file name. A format that was given beside it wins
// over the driver in it.
func (c *catalog) jsonOptions(
	ctx context.Context, text, format string, byImage bool,
) (*types.BlockdevOptions, *types.BlockdevRef, error) {
	if len(text) > maxNameText {
		return nil, nil, errNameTooLarge
	}
	v, err := value.Parse(text)
	if err != nil {
		return nil, nil, fmt.Errorf("Could not parse the JSON options: %w", err)
	}
	given, ok := v.(*value.Dict)
	if !ok {
		return nil, nil, errors.New("Invalid JSON object given")
	}
	d, err := unflatten(given)
	if err != nil {
		return nil, nil, err
	}
	if format != "" {
		d.Set("driver", format)
	}
	if err := c.chooseProtocols(ctx, d); err != nil {
		return nil, nil, err
	}
	if byImage {
		c.dropHints(d)
	}
	thens := completions{}
	c.complete(d, thens)
	if s, ok := d.Get("driver"); ok {
		if c.drivers[types.BlockdevDriver(fmt.Sprint(s))] == nil {
			return nil, nil, fmt.Errorf("Unknown driver '%v'", s)
		}
		o, err := types.DecodeBlockdevOptions(d, types.ModeKeyval)
		if err == nil {
			c.completed(o, d, thens)
		}
		return o, nil, err
	}
	f, ok := d.Get("file")
	if !ok || d.Len() > 1 {
		return nil, nil, errors.New("Must specify either driver or file")
	}
	file, err := types.DecodeBlockdevRef(f, types.ModeKeyval)
	if err == nil {
		c.completed(file.Definition, f, thens)
	}
	return nil, file, err
}

// completions are what is left to do once options are made of those in a name.
type completions map[*value.Dict]func(u any)

// complete adds what nodes in a "json:" file name leave out.
func (c *catalog) complete(v value.Value, thens completions) {
	switch v := v.(type) {
	case value.List:
		for _, x := range v {
			c.complete(x, thens)
		}
	case *value.Dict:
		name, _ := v.Get("driver")
		if d := c.drivers[types.BlockdevDriver(fmt.Sprint(name))]; d != nil && d.Complete != nil {
			if then := d.Complete(v); then != nil {
				thens[v] = then
			}
		}
		for _, mem := range v.Members() {
			c.complete(mem.Value, thens)
		}
	}
}

// completed does what is left for the options o, made of v, and those of their children.
func (c *catalog) completed(o *types.BlockdevOptions, v value.Value, thens completions) {
	given, ok := v.(*value.Dict)
	if !ok || o == nil || len(thens) == 0 {
		return
	}
	if then := thens[given]; then != nil {
		then(o.U)
	}
	d := c.drivers[o.Driver]
	if d == nil || o.U == nil {
		return
	}
	if d.Children != nil {
		for _, child := range d.Children(o.U) {
			c.completed(child.Ref.Definition, childOf(given, child.Name), thens)
		}
	}
	if d.Backing != nil {
		if b := d.Backing(o.U); b != nil {
			c.completed(b.Definition, childOf(given, "backing"), thens)
		}
	}
}

// childOf is what a name says of a child: "LIST.NUMBER" is an element of a list.
func childOf(o *value.Dict, name string) value.Value {
	if v, ok := o.Get(name); ok {
		return v
	}
	list, number, _ := strings.Cut(name, ".")
	v, _ := o.Get(list)
	l, _ := v.(value.List)
	if i, err := strconv.Atoi(number); err == nil && 0 <= i && i < len(l) {
		return l[i]
	}
	return nil
}

// Names in images and of clients are no longer than maxNameText bytes, nest no deeper than
// maxNameLevels, dots counted, and have no more than maxNameParts members and steps between dots.
const maxNameText, maxNameLevels, maxNameParts = 1 << 20, 128, 4096

var (
	errNameTooLarge = fmt.Errorf("A file name in JSON may have %d bytes, %d levels and %d members at most", maxNameText, maxNameLevels, maxNameParts)
	errNameMixed    = errors.New("Cannot mix scalar and non-scalar keys")
)

// unflatten turns dotted names into nested objects and scalars into the strings of the command
// line: names in images are written in either way.
func unflatten(in *value.Dict) (*value.Dict, error) {
	n := 0
	out, err := unflattenAt(in, 1, &n)
	if err != nil {
		return nil, err
	}
	out, ok := listify(out).(*value.Dict)
	if !ok {
		return nil, errors.New("Must specify either driver or file")
	}
	return out, nil
}

// unflattenAt is unflatten of what is at that level.
func unflattenAt(in *value.Dict, level int, n *int) (*value.Dict, error) {
	out := &value.Dict{}
	for _, mem := range in.Members() {
		if err := addPart(out, mem.Name, mem.Value, level, n); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// listPart makes the same of a list.
func listPart(in value.List, level int, n *int) (_ value.Value, err error) {
	out := make(value.List, len(in))
	for i, v := range in {
		if *n++; *n > maxNameParts || level > maxNameLevels {
			return nil, errNameTooLarge
		}
		switch x := v.(type) {
		case *value.Dict:
			out[i], err = unflattenAt(x, level+1, n)
		case value.List:
			out[i], err = listPart(x, level+1, n)
		default:
			out[i] = keyvalScalar(v)
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// listify makes lists of what has the numbers from 0 on for names.
func listify(v value.Value) value.Value {
	switch x := v.(type) {
	case value.List:
		for i := range x {
			x[i] = listify(x[i])
		}
	case *value.Dict:
		list := make(value.List, x.Len())
		for i := range list {
			elem, ok := x.Get(strconv.Itoa(i))
			if !ok {
				list = nil
				break
			}
			list[i] = listify(elem)
		}
		if len(list) > 0 {
			return list
		}
		for _, mem := range x.Members() {
			x.Set(mem.Name, listify(mem.Value))
		}
	}
	return v
}

// addPart adds v, under a dotted name, to at, which is at that level. n counts the parts of the
// whole.
func addPart(at *value.Dict, name string, v value.Value, level int, n *int) error {
	for ; ; level++ {
		if *n++; *n > maxNameParts || level > maxNameLevels {
			return errNameTooLarge
		}
		step, rest, more := strings.Cut(name, ".")
		old, taken := at.Get(step)
		sub, nests := v.(*value.Dict)
		if !more && !nests {
			if taken {
				return errNameMixed
			}
			if l, ok := v.(value.List); ok {
				var err error
				if v, err = listPart(l, level+1, n); err != nil {
					return err
				}
			}
			at.Set(step, keyvalScalar(v))
			return nil
		}
		next, ok := old.(*value.Dict)
		switch {
		case taken && !ok:
			return errNameMixed
		case !taken:
			next = &value.Dict{}
			at.Set(step, next)
		}
		if more {
			at, name = next, rest
			continue
		}
		for _, mem := range sub.Members() {
			if err := addPart(next, mem.Name, mem.Value, level+1, n); err != nil {
				return err
			}
		}
		return nil
	}
}

// keyvalScalar writes a scalar as a command line would have it.
func keyvalScalar(v value.Value) value.Value {
	switch x := v.(type) {
	case bool:
		if x {
			return "on"
		}
		return "off"
	case int64:
		return strconv.FormatInt(x, 10)
	case uint64:
		return strconv.FormatUint(x, 10)
	case float64:
		return string(value.AppendDouble(nil, x))
	}
	return v
}

// chooseProtocols fills in the driver of files that are given by their name alone.
func (c *catalog) chooseProtocols(ctx context.Context, d *value.Dict) error {
	for _, mem := range d.Members() {
		l, _ := mem.Value.(value.List)
		for _, elem := range l {
			if sub, ok := elem.(*value.Dict); ok {
				if err := c.chooseProtocols(ctx, sub); err != nil {
					return err
				}
			}
		}
		sub, ok := mem.Value.(*value.Dict)
		if !ok {
			continue
		}
		name, named := sub.Get("filename")
		_, chosen := sub.Get("driver")
		if s, ok := name.(string); ok && named && !chosen && mem.Name == "file" {
			d, _, err := c.pathDriver(ctx, s)
			if err != nil {
				return err
			}
			if d != nil {
				sub.Set("driver", string(d.Name))
			}
		}
		if err := c.chooseProtocols(ctx, sub); err != nil {
			return err
		}
	}
	return nil
}
