package blockdev

import (
	"context"
	"errors"
	"fmt"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// createImage makes an image in a file, which is made or overwritten, or on a device. It blocks as
// long as the storage does. A file that it has made does not stay after an error.
func (m *Manager) createImage(ctx context.Context, c *creation, filename, format string, i *driver.Image) (err error) {
	d := m.drivers[types.BlockdevDriver(format)]
	if d == nil {
		return fmt.Errorf("Unknown file format '%s'", format)
	}
	if d.NewImage == nil && !d.Verbatim {
		return fmt.Errorf("Format driver '%s' does not support image creation", format)
	}
	if i.Backing != "" {
		if d.Backing == nil {
			return fmt.Errorf("Backing file not supported for file format '%s'", format)
		}
		if i.Backing == filename {
			return errors.New("Error: Trying to create an image with the same filename as the backing file")
		}
		if len(i.Backing) > d.MaxBackingName || len(i.BackingFormat) > d.MaxBackingFormat {
			return fmt.Errorf("Could not assign backing file '%s' with format '%s': Invalid argument",
				i.Backing, i.BackingFormat)
		}
	}
	o, err := m.protocolOptions(ctx, filename)
	if err != nil {
		return err
	}
	bare := d.Verbatim || d.FromFile == nil // the file is the image
	switch p := m.drivers[o.Driver]; {
	case p.Preexisting:
		err = m.overwrite(ctx, o, bare, i.Size)
	case p.NewImage == nil:
		return fmt.Errorf("Protocol driver '%s' does not support image creation", o.Driver)
	default:
		defer func() {
			if err != nil {
				c.undo()
			}
		}()
		file := &driver.Image{}
		if bare {
			file.Size = i.Size
		}
		err = p.Create(ctx, c.given(nil), p.NewImage(o.U, file))
	}
	if err != nil || bare {
		return err
	}
	u := d.FromFile(types.BlockdevRef{Definition: o})
	return d.Create(ctx, c.given(nil), d.NewImage(u, i))
}

// overwrite opens what is there already and keeps its size, so that an image can be made on it. A
// bare image is made by this.
func (m *Manager) overwrite(ctx context.Context, o *types.BlockdevOptions, bare bool, size int64) error {
	opened := false
	err := m.inFile(ctx, &types.BlockdevRef{Definition: o}, func(root *graph.Root) error {
		opened = true
		if !bare {
			return nil
		}
		if root.Node().Size() < size {
			return errors.New("Cannot grow device files")
		}
		r, err := root.Begin(ctx)
		if err != nil {
			return err
		}
		defer root.End(r)
		// So that nobody takes it for what was there before.
		return root.Edge().Zero(r, 0, min(probeBytes, root.Node().Size()), 0)
	})
	if err != nil && !opened {
		return fmt.Errorf("Protocol driver '%s' does not support image creation, and opening the image failed: %w",
			o.Driver, err)
	}
	return err
}

// Opened is a tree of nodes that was opened and that nobody else sees yet. Either Publish and then
// Done follow, or Discard.
type Opened struct {
	o    *opener
	node *graph.Node
	made *creation // what keeps the file from others until it is published; nil: it was not made
}

// OpenImage describes an image that is opened by its file name, or made.
type OpenImage struct {
	Filename string
	Mode     *types.NewImageMode // nil: it is made
	Format   *string             // name of a driver; nil: that of For, or for an image that exists as guessed
	Name     string              // of the node; "": generated
	ReadOnly bool
	// For is the node that the image is to be an overlay or a copy of: it caches alike, and a new
	// one is as long. Nil: an image that exists caches as by default.
	For *graph.Node
	// Below is what a new image names as its backing file, by what View shows; nil: nothing.
	Below *graph.Node
	View  graph.View
	// Backing: it is opened with the backing file that its header names; else without any.
	Backing bool
	// Unmap: discards, and writes of zeroes, make holes.
	Unmap bool
}

// OpenImage opens the image in a file by its name, and makes it first if it is new. It blocks as
// long as the storage does.
func (m *Manager) OpenImage(ctx context.Context, i OpenImage) (*Opened, error) {
	if i.Mode != nil && *i.Mode == types.NewImageModeExisting {
		return m.openImage(ctx, i)
	}
	made := driver.Image{Size: i.For.Size()}
	if i.Below != nil {
		var err error
		if made.Backing, made.BackingFormat, err = m.HeaderName(i.View, i.Below); err != nil {
			return nil, err
		}
	}
	if i.Format == nil {
		i.Format = new(i.For.DriverName())
	}
	return m.makeImage(ctx, i, &made)
}

func (m *Manager) makeImage(ctx context.Context, i OpenImage, made *driver.Image) (*Opened, error) {
	c := &creation{m: m}
	err := m.createImage(ctx, c, i.Filename, *i.Format, made)
	var x *Opened
	if err == nil {
		x, err = m.openImage(ctx, i)
	}
	if err != nil {
		c.end()
		return nil, err
	}
	x.made = c
	return x, nil
}

func (m *Manager) openImage(ctx context.Context, i OpenImage) (*Opened, error) {
	opts, fileRef, err := m.namedOptions(ctx, i.Filename, types.Or(i.Format, ""), false)
	if err != nil {
		return nil, err
	}
	discard, zeroes := types.BlockdevDiscardOptionsIgnore, types.BlockdevDetectZeroesOptionsOff
	like := &graph.Options{}
	if i.For != nil {
		like = i.For.Options()
	}
	if like.Discard || i.Unmap {
		discard = types.BlockdevDiscardOptionsUnmap
	}
	if i.Unmap {
		zeroes = types.BlockdevDetectZeroesOptionsUnmap
	}
	generic := types.BlockdevOptions{
		ReadOnly: &i.ReadOnly, Discard: &discard, DetectZeroes: &zeroes,
		Cache: &types.BlockdevCacheOptions{Direct: &like.Direct, NoFlush: &like.NoFlush},
	}
	if i.Name != "" {
		generic.NodeName = &i.Name
	}
	var p *plan
	if opts != nil {
		generic.Driver, generic.U = opts.Driver, opts.U
		p, err = m.plan(&generic, nil, 0, nil)
	} else {
		p, err = m.planGuessed(fileRef, inherit(&generic, nil, 0), nil)
	}
	if err != nil {
		return nil, err
	}
	p.noBacking = !i.Backing
	return m.newOpener(ctx).openHidden(p)
}

// SetBacking lets tx give n that node as its backing file, or none.
func SetBacking(tx *graph.Tx, n, backing *graph.Node) error {
	e := tx.Child(n, "backing")
	switch {
	case e == nil && backing == nil:
		return nil
	case backing == nil:
		return tx.Detach(e)
	case e == nil:
		_, err := tx.Attach(n, "backing", perm.COW, backing)
		return err
	}
	return tx.Replace(e, backing)
}

// OpenBacking opens the backing file that the header of n's image names, as opening the image would
// have, and lets tx attach and publish it; nil if the header names none. It blocks as long as the
// storage does.
func (m *Manager) OpenBacking(ctx context.Context, tx *graph.Tx, n *graph.Node) (*Opened, error) {
	x, err := m.openBacking(ctx, n)
	if x == nil || err != nil {
		return nil, err
	}
	if err = SetBacking(tx, n, x.node); err == nil {
		err = x.Publish(tx)
	}
	if err != nil {
		x.Discard()
		return nil, err
	}
	return x, nil
}

func (m *Manager) openBacking(ctx context.Context, n *graph.Node) (*Opened, error) {
	name, format := backingFile(n)
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
	if x.made != nil {
		x.made.end()
	}
}

// Finish is Done if the outcome of the transaction is nil, else Discard. A nil Opened has nothing
// to finish.
func (x *Opened) Finish(outcome error) {
	switch {
	case x == nil:
	case outcome == nil:
		x.Done()
	default:
		x.Discard()
	}
}

// Discard closes the tree. It waits for nothing but the drivers' Close.
func (x *Opened) Discard() {
	x.o.discard()
	x.Done()
}
