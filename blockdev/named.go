package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Policy limits what image headers can make the daemon open. The zero value allows what the
// reference allows, but references to nodes of the daemon.
type Policy struct {
	// MaxChain is the longest chain that headers may span, in images; 0 means 1000.
	MaxChain int
	// References: json: names may name existing nodes. An image that somebody else made could so read
	// what it was never meant to see.
	References bool
	// Allow, if set, is asked for every node, with the options it would get; an error refuses the whole chain.
	Allow func(o *types.BlockdevOptions) error
}

const defaultMaxChain = 1000

// planNamed makes the plan of a backing file that an image header names, in a format it names or,
// if that is empty, to be guessed. It is the only way from the words in an image to an open file.
func (m *Manager) planNamed(ctx context.Context, name, format string, up *graph.Options, from *link) (*plan, error) {
	l := &link{name: name, depth: 1, up: from}
	if from != nil {
		l.depth = from.depth + 1
	}
	for x := from; x != nil; x = x.up {
		if x.name == name {
			return nil, fmt.Errorf("Backing file '%s' creates an infinite loop", name)
		}
	}
	limit := m.policy.MaxChain
	if limit == 0 {
		limit = defaultMaxChain
	}
	if l.depth > limit {
		return nil, fmt.Errorf("The chain of backing files is longer than %d images", limit)
	}
	opts, file, err := m.namedOptions(ctx, name, format)
	if err != nil {
		return nil, err
	}
	if opts != nil {
		if err := m.admit(opts); err != nil {
			return nil, err
		}
		return m.plan(opts, up, perm.COW, l)
	}
	if err := m.admitRef(file); err != nil {
		return nil, err
	}
	p := &plan{gen: inherit(&types.BlockdevOptions{}, up, perm.COW), link: l}
	k, err := m.planRef(file, p.gen, perm.Image, l)
	if err != nil {
		return nil, err
	}
	p.opts = &types.BlockdevOptions{U: file}
	p.kids = []planChild{{"file", perm.Image, k}}
	return p, nil
}

// admit asks the policy about o and everything below.
func (m *Manager) admit(o *types.BlockdevOptions) error {
	if m.policy.Allow != nil {
		if err := m.policy.Allow(o); err != nil {
			return err
		}
	}
	d := m.drivers[o.Driver]
	if d == nil {
		return fmt.Errorf("Unknown driver '%s'", o.Driver)
	}
	if d.Children != nil {
		for _, c := range d.Children(o.U) {
			if err := m.admitRef(c.Ref); err != nil {
				return err
			}
		}
	}
	if d.Backing != nil {
		if b := d.Backing(o.U); b != nil && !b.Null && (b.Reference == nil || *b.Reference != "") {
			return m.admitRef(&types.BlockdevRef{Definition: b.Definition, Reference: b.Reference})
		}
	}
	return nil
}

func (m *Manager) admitRef(r *types.BlockdevRef) error {
	if r.Definition != nil {
		return m.admit(r.Definition)
	}
	if !m.policy.References {
		return fmt.Errorf("An image may not name the node '%s'", *r.Reference)
	}
	return nil
}

// namedOptions turns a file name into options, or, where the format has to be guessed, into the file alone.
func (m *Manager) namedOptions(ctx context.Context, name, format string) (*types.BlockdevOptions, *types.BlockdevRef, error) {
	if text, ok := strings.CutPrefix(name, "json:"); ok {
		return m.jsonOptions(ctx, text, format)
	}
	if format == "" {
		o, err := m.protocolOptions(ctx, name)
		return nil, &types.BlockdevRef{Definition: o}, err
	}
	d := m.drivers[types.BlockdevDriver(format)]
	if d == nil {
		return nil, nil, fmt.Errorf("Unknown driver '%s'", format)
	}
	if d.Kind == graph.Protocol {
		u, err := d.FromName(name)
		return &types.BlockdevOptions{Driver: d.Name, U: u}, nil, err
	}
	o, err := m.protocolOptions(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	return &types.BlockdevOptions{Driver: d.Name, U: d.FromFile(types.BlockdevRef{Definition: o})}, nil, nil
}

// protocolOptions chooses the protocol for a file name, which may start with "PROTOCOL:".
func (m *Manager) protocolOptions(ctx context.Context, name string) (*types.BlockdevOptions, error) {
	plain, err := plainDriver(ctx, name)
	if err != nil {
		return nil, err
	}
	d := m.drivers[plain]
	if d == nil || d.Name == types.BlockdevDriverFile && hasProtocol(name) {
		prefix, _, _ := strings.Cut(name, ":")
		d = nil
		for _, x := range m.drivers {
			if x.Prefix == prefix && prefix != "" {
				d = x
			}
		}
		if d == nil {
			return nil, fmt.Errorf("Unknown protocol '%s'", prefix)
		}
	}
	u, err := d.FromName(name)
	if err != nil {
		return nil, err
	}
	return &types.BlockdevOptions{Driver: d.Name, U: u}, nil
}

// plainDriver is the driver for a path: devices have their own. It blocks as long as the storage does, but no
// longer than ctx.
func plainDriver(ctx context.Context, name string) (types.BlockdevDriver, error) {
	device, err := await(ctx, func() bool {
		st, err := os.Stat(name)
		return err == nil && st.Mode()&os.ModeDevice != 0
	})
	if device {
		return types.BlockdevDriverHostDevice, err
	}
	return types.BlockdevDriverFile, err
}

// await calls f, which may get stuck in the kernel, and waits for its result no longer than ctx.
func await[T any](ctx context.Context, f func() T) (got T, err error) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case got = <-done:
		return got, nil
	case <-ctx.Done():
		return got, ctx.Err()
	}
}

// jsonOptions reads what follows "json:" in a file name. A format that was given beside it wins over the
// driver in it.
func (m *Manager) jsonOptions(ctx context.Context, text, format string) (*types.BlockdevOptions, *types.BlockdevRef, error) {
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
	if err := chooseProtocols(ctx, d); err != nil {
		return nil, nil, err
	}
	if _, ok := d.Get("driver"); ok {
		if s, _ := d.Get("driver"); m.drivers[types.BlockdevDriver(fmt.Sprint(s))] == nil {
			return nil, nil, fmt.Errorf("Unknown driver '%v'", s)
		}
		o, err := types.DecodeBlockdevOptions(d, types.ModeKeyval)
		return o, nil, err
	}
	f, ok := d.Get("file")
	if !ok || d.Len() > 1 {
		return nil, nil, errors.New("Must specify either driver or file")
	}
	file, err := types.DecodeBlockdevRef(f, types.ModeKeyval)
	return nil, file, err
}

// unflatten turns dotted names into nested objects and scalars into the strings of the command
// line: names in images are written in either way.
func unflatten(in *value.Dict) (*value.Dict, error) {
	out := &value.Dict{}
	for _, mem := range in.Members() {
		v := mem.Value
		switch x := v.(type) {
		case *value.Dict:
			sub, err := unflatten(x)
			if err != nil {
				return nil, err
			}
			v = sub
		case bool:
			v = "off"
			if x {
				v = "on"
			}
		case int64:
			v = strconv.FormatInt(x, 10)
		case uint64:
			v = strconv.FormatUint(x, 10)
		case float64:
			v = string(value.AppendDouble(nil, x))
		}
		at := out
		path := strings.Split(mem.Name, ".")
		for _, step := range path[:len(path)-1] {
			next, ok := at.Get(step)
			if !ok {
				next = &value.Dict{}
				at.Set(step, next)
			}
			if at, ok = next.(*value.Dict); !ok {
				return nil, fmt.Errorf("Cannot mix scalar and non-scalar keys")
			}
		}
		last := path[len(path)-1]
		if old, ok := at.Get(last); ok {
			a, okA := old.(*value.Dict)
			b, okB := v.(*value.Dict)
			if !okA || !okB {
				return nil, fmt.Errorf("Cannot mix scalar and non-scalar keys")
			}
			for _, mem := range b.Members() {
				a.Set(mem.Name, mem.Value)
			}
			continue
		}
		at.Set(last, v)
	}
	return out, nil
}

// chooseProtocols fills in the driver of files that are given by their name alone.
func chooseProtocols(ctx context.Context, d *value.Dict) error {
	for _, mem := range d.Members() {
		sub, ok := mem.Value.(*value.Dict)
		if !ok {
			continue
		}
		name, named := sub.Get("filename")
		_, chosen := sub.Get("driver")
		if s, ok := name.(string); ok && named && !chosen && mem.Name == "file" {
			driver, err := plainDriver(ctx, s)
			if err != nil {
				return err
			}
			sub.Set("driver", string(driver))
		}
		if err := chooseProtocols(ctx, sub); err != nil {
			return err
		}
	}
	return nil
}
