package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"qblockd/blockdev/file"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// NewImage describes an image that a command makes under way.
type NewImage struct {
	Filename string
	Format   string // name of a driver
	Size     int64  // bytes
	// Backing is the file name that the new image names as its backing file, of the format BackingFormat; "" for none.
	Backing, BackingFormat string
}

// maxBackingName and maxBackingFormat are the longest words, in bytes, that the headers of images have room for.
const maxBackingName, maxBackingFormat = 1023, 15

// CreateImage makes an image in a file, which is made or overwritten. It blocks as long as the storage does. A file that it has made
// does not stay after an error.
func (m *Manager) CreateImage(ctx context.Context, i NewImage) (err error) {
	d := m.drivers[types.BlockdevDriver(i.Format)]
	if d == nil {
		return fmt.Errorf("Unknown file format '%s'", i.Format)
	}
	switch d.Name {
	case types.BlockdevDriverQcow2, types.BlockdevDriverRaw, types.BlockdevDriverFile:
	default:
		return fmt.Errorf("Format driver '%s' does not support image creation", i.Format)
	}
	if i.Backing != "" {
		if d.Backing == nil {
			return fmt.Errorf("Backing file not supported for file format '%s'", i.Format)
		}
		if i.Backing == i.Filename {
			return errors.New("Error: Trying to create an image with the same filename as the backing file")
		}
		if len(i.Backing) > maxBackingName || len(i.BackingFormat) > maxBackingFormat {
			return fmt.Errorf("Could not assign backing file '%s' with format '%s': Invalid argument", i.Backing, i.BackingFormat)
		}
	}
	path, err := m.creationPath(ctx, i.Filename)
	if err != nil {
		return err
	}
	fresh, err := await(ctx, func() bool { _, err := os.Lstat(path); return errors.Is(err, fs.ErrNotExist) })
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && fresh {
			os.Remove(path)
		}
	}()
	o := &types.BlockdevCreateOptionsFile{Filename: path}
	if d.Name != types.BlockdevDriverQcow2 {
		o.Size = uint64(i.Size)
	}
	if err := file.Create(ctx, o, func() {}); err != nil || d.Name != types.BlockdevDriverQcow2 {
		return err
	}
	q := &types.BlockdevCreateOptionsQcow2{
		File: types.BlockdevRef{Definition: &types.BlockdevOptions{
			Driver: types.BlockdevDriverFile, U: &types.BlockdevOptionsFile{Filename: path},
		}},
		Size: uint64(i.Size),
	}
	if i.Backing != "" {
		format := types.BlockdevDriver(i.BackingFormat)
		q.BackingFile, q.BackingFmt = &i.Backing, &format
	}
	return m.Creator(&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: q})(ctx, func() {})
}

// creationPath is where the image called name, which may start with "PROTOCOL:", is made. Errors: a protocol that is unknown or has no files.
func (m *Manager) creationPath(ctx context.Context, name string) (string, error) {
	o, err := m.protocolOptions(ctx, name)
	if err != nil {
		return "", err
	}
	f, ok := o.U.(*types.BlockdevOptionsFile)
	if !ok {
		return "", fmt.Errorf("Protocol driver '%s' does not support image creation", o.Driver)
	}
	return f.Filename, nil
}

// Opened is a tree of nodes that was opened and that nobody else sees yet. Either Publish and then Done follow, or Discard.
type Opened struct {
	o    *opener
	node *graph.Node
}

// OpenImage describes an image to be opened by its file name.
type OpenImage struct {
	Filename string
	Format   string // name of a driver; "": guessed
	Name     string // of the node; "": generated
	ReadOnly bool
	Backing  bool // with the backing file that its header names; else without any
	// Like gives how it caches; Unmap: discards, and writes of zeroes, make holes.
	Like  *graph.Options
	Unmap bool
}

// OpenImage opens the image in a file by its name. It blocks as long as the storage does.
func (m *Manager) OpenImage(ctx context.Context, i OpenImage) (*Opened, error) {
	opts, fileRef, err := m.namedOptions(ctx, i.Filename, i.Format)
	if err != nil {
		return nil, err
	}
	discard, zeroes := types.BlockdevDiscardOptionsIgnore, types.BlockdevDetectZeroesOptionsOff
	if i.Like.Discard || i.Unmap {
		discard = types.BlockdevDiscardOptionsUnmap
	}
	if i.Unmap {
		zeroes = types.BlockdevDetectZeroesOptionsUnmap
	}
	generic := types.BlockdevOptions{
		ReadOnly: &i.ReadOnly, Discard: &discard, DetectZeroes: &zeroes,
		Cache: &types.BlockdevCacheOptions{Direct: &i.Like.Direct, NoFlush: &i.Like.NoFlush},
	}
	if i.Name != "" {
		generic.NodeName = &i.Name
	}
	var p *plan
	if opts != nil {
		generic.Driver, generic.U = opts.Driver, opts.U
		p, err = m.plan(&generic, nil, 0, nil)
	} else {
		p = &plan{gen: inherit(&generic, nil, 0)}
		var k *plan
		if k, err = m.planRef(fileRef, p.gen, perm.Image, nil); err == nil {
			p.opts = &types.BlockdevOptions{U: fileRef}
			p.kids = []planChild{{"file", perm.Image, k}}
		}
	}
	if err != nil {
		return nil, err
	}
	p.noBacking = !i.Backing
	return m.newOpener(ctx).openHidden(p)
}

// OpenBacking opens the backing file that the header of n's image names, as opening the image would have; nil if it names none. It blocks as
// long as the storage does.
func (m *Manager) OpenBacking(ctx context.Context, n *graph.Node) (*Opened, error) {
	image, ok := n.Driver().(graph.Backed)
	if !ok {
		return nil, nil
	}
	name, format := image.BackingFile()
	if name == "" {
		return nil, nil
	}
	full, err := m.absolute(n, name)
	if err != nil {
		return nil, err
	}
	p, err := m.planNamed(ctx, full, format, n, nil)
	if err != nil {
		return nil, err
	}
	return m.newOpener(ctx).openHidden(p)
}

// Node is the top of the tree.
func (x *Opened) Node() *graph.Node { return x.node }

// Publish lets tx make the tree visible. Its nodes live as long as something refers to them.
func (x *Opened) Publish(tx *graph.Tx) error {
	for _, r := range x.o.roots {
		if err := tx.DetachRoot(r); err != nil {
			return err
		}
	}
	return tx.Publish(x.node)
}

// Done is called when tx has been committed.
func (x *Opened) Done() {
	for _, n := range x.o.nodes {
		x.o.m.record(n).seen.Store(true)
	}
}

// Discard closes the tree. It waits for nothing but the drivers' Close.
func (x *Opened) Discard() { x.o.discard() }
