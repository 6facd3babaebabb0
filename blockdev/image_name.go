package blockdev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// This file is the one way from the words in an image to an open node, and decides what they may
// lead to. Whoever made the image is not trusted: it may have been a guest.
//
//   - Only drivers that say they are for it (driver.Def.ForImages), with the options that they
//     list: those that say where and what data are. Others that say only how they are read may be
//     given and do not count. Of the options that all drivers have, an image gives none: its nodes
//     have those of the node whose image it is, and are read-only, so that nothing is written,
//     repaired or locked against readers. A command may make such a node writable later
//     (block-commit).
//   - Only files that the Policy allows, which is decided by what a name has led to, not by its
//     words.
//   - No chain without end: an image that is its own ancestor is found by its file, and chains have
//     a longest length.

// Policy limits what image headers can make the daemon open. The zero value allows regular files,
// absolute or relative, but those that the kernel makes up (/proc, /sys), no devices, and no nodes
// and objects of the daemon.
type Policy struct {
	// MaxChain is how many images headers may lead to, one after the other, from one that its user
	// names; 0 means 1000, less than 0: none.
	MaxChain int
	// References: json: names may name existing nodes, and throttle groups. An image that somebody
	// else made could so read what it was never meant to see, and use up what others are allowed.
	References bool
	// Devices: block devices may be named.
	Devices bool
	// Sockets: servers may be named, of this host and others.
	Sockets bool
	// DataFiles are those that may be named for the image's own data.
	DataFiles DataFiles
	// Roots are the folders below which files must be; none: anywhere. They are absolute and free
	// of symbolic links (SetRoots).
	Roots []string
}

const defaultMaxChain = 1000

// SetRoots sets Roots to folders, which have to be there.
func (p *Policy) SetRoots(folders ...string) error {
	p.Roots = nil
	for _, f := range folders {
		if !filepath.IsAbs(f) {
			return fmt.Errorf("'%s' is not an absolute path", f)
		}
		path, err := filepath.EvalSymlinks(f)
		if err != nil {
			return err
		}
		if st, err := os.Stat(path); err != nil {
			return err
		} else if !st.IsDir() {
			return fmt.Errorf("'%s' is not a folder", f)
		}
		p.Roots = append(p.Roots, path)
	}
	return nil
}

// link is one step of a chain of files that images name.
type link struct {
	name string
	up   *link
	from imagePlace // of the image that has the name in its header
	// beside, if set, is the folder that a file must be in: it is to be written to.
	beside string
	// names counts those that were followed since the image that its user named, all of them: one
	// name can lead to several images with names of their own (an image within an image), so that a
	// bound on the length of each way would not be one on the work.
	names *int
}

// imagePlace is where an image begins; the zero value: nobody knows.
type imagePlace struct {
	file   graph.FileID
	offset int64
}

// placeOf finds out where an image begins that lies in the node n.
func placeOf(n *graph.Node) (at imagePlace) {
	for {
		switch d := n.Driver().(type) {
		case graph.Identified:
			at.file = d.FileID()
			return at
		case interface{ Offset() int64 }:
			at.offset += d.Offset()
		default:
			if n.Kind() != graph.Filter {
				return imagePlace{} // within another image
			}
		}
		e := n.File()
		if e == nil {
			return imagePlace{}
		}
		n = e.Node()
	}
}

// endless is the error of an image that names itself, directly or by way of others. file is where
// it lies.
func (l *link) endless(file *graph.Node) error {
	at := placeOf(file)
	if at == (imagePlace{}) {
		return nil
	}
	for x := l; x != nil; x = x.up {
		if x.from == at {
			return fmt.Errorf("Backing file '%s' creates an infinite loop", l.name)
		}
	}
	return nil
}

// planNamed makes the plan of a backing file that the header of an image names, in a format it
// names or, if that is empty, to be guessed. l led to the image; nil if its user named it.
func (pl *planner) planNamed(ctx context.Context, name, format string, image *graph.Node, l *link) (*plan, error) {
	up := image.Options()
	l, err := pl.follow(name, image, l)
	if err != nil {
		return nil, err
	}
	opts, file, err := pl.namedOptions(ctx, name, format, true)
	if err != nil {
		return nil, err
	}
	if opts != nil {
		if opts, err = pl.admit(opts); err != nil {
			return nil, err
		}
		return pl.plan(opts, up, perm.COW, l)
	}
	if err := pl.admitRef(file); err != nil {
		return nil, err
	}
	return pl.planGuessed(file, inherit(&types.BlockdevOptions{}, up, perm.COW), l)
}

// follow is the step from an image to what name in its header leads to.
func (pl *planner) follow(name string, image *graph.Node, l *link) (*link, error) {
	l = &link{name: name, up: l, names: new(int)}
	if l.up != nil {
		l.names = l.up.names
	}
	*l.names++
	if e := image.File(); e != nil {
		l.from = placeOf(e.Node())
	}
	switch limit := cmp.Or(pl.policy.MaxChain, defaultMaxChain); {
	case limit < 0:
		return nil, errors.New("The image policy allows no backing files")
	case *l.names > limit:
		return nil, fmt.Errorf("The chain of backing files is longer than %d images", limit)
	}
	return l, nil
}

// DataFiles says which files an image may name that its data are in. They are written to.
type DataFiles uint8

const (
	// DataBeside: those in the folder that the image is in, whose users have that one, too.
	DataBeside DataFiles = iota
	DataNowhere
	DataAnywhere
)

// planData makes the plan of the file that the header of an image says its data are in. Its name is
// a path on this host, whatever it looks like.
func (m *Manager) planData(ctx context.Context, image *graph.Node, c *driver.ChildNeeded, l *link) (*plan, error) {
	if m.policy.DataFiles == DataNowhere {
		return nil, fmt.Errorf("The image policy allows no data files: '%s'", c.File)
	}
	l, err := m.follow(c.File, image, l)
	if err != nil {
		return nil, err
	}
	if m.policy.DataFiles == DataBeside {
		if l.beside, err = m.folderOf(ctx, image); err != nil {
			return nil, err
		}
	}
	name := c.File
	if driver.HasProtocol(name) {
		name = "./" + name
	}
	opts, err := m.protocolOptions(ctx, name)
	if err != nil {
		return nil, err
	}
	if opts, err = m.admit(opts); err != nil {
		return nil, err
	}
	return m.plan(opts, image.Options(), c.Role, l)
}

// folderOf is the folder, without links, of the file that an image is in; "" if it is in none of
// this host.
func (m *Manager) folderOf(ctx context.Context, image *graph.Node) (dir string, err error) {
	n := image
	for e := n.File(); e != nil; e = n.File() {
		n = e.Node()
	}
	name := driver.StripPrefix(m.name(n).plain, "file:")
	err = panics.Await(ctx, "a look at a file", func() {
		if path, e := canonical(name); e == nil {
			dir = filepath.Dir(path)
		}
	})
	if err == nil && dir == "" {
		err = fmt.Errorf("The image policy allows data files beside the image only, and it is in no folder: '%s'", image.DriverName())
	}
	return dir, err
}

// genericHints are the options of all drivers that may be given and do not count.
var genericHints = []string{"discard", "cache", "read-only", "auto-read-only", "force-share", "detect-zeroes"}

// dropHints takes the options that do not count out of those that an image gives, and of the
// children in them. Where the driver is not given, and will be guessed, those of all that it can be
// go. Of nodes with a driver the generic ones are left to admit: they are checked first.
func (c *catalog) dropHints(o *value.Dict) {
	drop := func(names []string) {
		for _, name := range names {
			o.Del(name)
		}
	}
	name, given := o.Get("driver")
	if !given {
		drop(genericHints)
	}
	for _, d := range c.order {
		if d.ForImages == nil || name != string(d.Name) && (given || d.FromFile == nil) {
			continue
		}
		drop(d.ForImages.Hints)
		listed, _ := o.Get(d.List)
		l, _ := listed.(value.List)
		for _, elem := range l {
			if sub, ok := elem.(*value.Dict); ok {
				c.dropHints(sub)
			}
		}
	}
	for _, child := range []string{"file", "data-file", "backing"} {
		sub, _ := o.Get(child)
		if sub, ok := sub.(*value.Dict); ok {
			c.dropHints(sub)
		}
	}
}

// admit decides about the node that o describes, and everything below. It returns what of o an
// image may say.
func (pl *planner) admit(o *types.BlockdevOptions) (*types.BlockdevOptions, error) {
	d := pl.drivers[o.Driver]
	switch {
	case d == nil:
		return nil, fmt.Errorf("Unknown driver '%s'", o.Driver)
	case d.ForImages == nil:
		return nil, fmt.Errorf("An image may not name a node of the driver '%s'", o.Driver)
	case d.ForImages.Devices && !pl.policy.Devices:
		return nil, errNoDevices
	case d.ForImages.Sockets && !pl.policy.Sockets:
		return nil, fmt.Errorf("The image policy allows no sockets: an image may not name a node of the driver '%s'", o.Driver)
	case d.ForImages.Object != "" && !pl.policy.References:
		return nil, fmt.Errorf("An image may not name a %s", d.ForImages.Object)
	case o.NodeName != nil:
		return nil, fmt.Errorf("An image may not give a node the name '%s'", *o.NodeName)
	}
	o = &types.BlockdevOptions{Driver: o.Driver, U: o.U}
	children := []string{d.List}
	if d.Children != nil {
		for _, c := range d.Children(o.U) {
			children = append(children, c.Name)
			if err := pl.admitRef(c.Ref); err != nil {
				return nil, err
			}
		}
	}
	if d.Backing != nil {
		children = append(children, "backing")
		if b := d.Backing(o.U); b != nil && !b.Null && (b.Reference == nil || *b.Reference != "") {
			r := &types.BlockdevRef{Definition: b.Definition, Reference: b.Reference}
			if err := pl.admitRef(r); err != nil {
				return nil, err
			}
			b.Definition = r.Definition
		}
	}
	for _, mem := range optionDict(o).Members() {
		if slices.Contains(d.ForImages.Naming, mem.Name) {
			if !pl.policy.References {
				return nil, fmt.Errorf("An image may not name a secret")
			}
			continue
		}
		if mem.Name != "driver" && !slices.Contains(children, mem.Name) && !slices.Contains(d.ForImages.Options, mem.Name) {
			return nil, fmt.Errorf("An image may not give the option '%s' of the driver '%s'", mem.Name, o.Driver)
		}
	}
	return o, nil
}

// admitRef decides about a child, and replaces its options by what of them an image may say.
func (pl *planner) admitRef(r *types.BlockdevRef) (err error) {
	if r.Definition != nil {
		r.Definition, err = pl.admit(r.Definition)
		return err
	}
	if !pl.policy.References {
		return fmt.Errorf("An image may not name the node '%s'", *r.Reference)
	}
	return nil
}

var errNoDevices = errors.New("The image policy allows no devices")

// admitFile decides about a file of the host that an image names, by way of l.
func (pl *planner) admitFile(f *driver.FoundFile, l *link) error {
	switch {
	case f.Device && !pl.policy.Devices:
		return fmt.Errorf("%w: '%s'", errNoDevices, f.Name)
	case !f.Device && !f.Regular && !f.Socket:
		return fmt.Errorf("An image may only name regular files and block devices: '%s' is neither", f.Name)
	case l.beside != "" && (!f.Regular || filepath.Dir(f.Path) != l.beside):
		return fmt.Errorf("The image policy allows data files beside the image only: '%s'", f.Name)
	case f.Kernel:
		return fmt.Errorf("An image may not name a file that the kernel makes up: '%s'", f.Name)
	case len(pl.policy.Roots) == 0:
		return nil
	}
	for _, root := range pl.policy.Roots {
		if strings.HasPrefix(f.Path, strings.TrimSuffix(root, "/")+"/") {
			return nil
		}
	}
	return fmt.Errorf("The image policy does not allow files in the folder of '%s'", f.Name)
}
