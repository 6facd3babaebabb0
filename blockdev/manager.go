package blockdev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"weak"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Config is what a Manager depends on beyond its graph. The zero value is what the daemon uses.
type Config struct {
	// Drivers that can be opened (package drivers). Of formats that fit a header equally well the
	// first is taken.
	Drivers []*driver.Any
	// Objects of object-add that drivers may use; nil: there are none.
	Objects driver.Objects
	// Policy for what images name.
	Policy Policy
	// Probed is told of nodes of the daemon that were looked into as another node was opened on
	// them; nil: nobody.
	Probed func(n *graph.Node)
	// Log takes warnings; nil means slog.Default().
	Log *slog.Logger
}

// Manager opens, finds, describes and removes the nodes of one graph. All methods may be called
// from any goroutine.
type Manager struct {
	finder
	*catalog
	*names
	*planner
	*queries
	bitmaps
	log     *slog.Logger
	probed  func(n *graph.Node)
	objects driver.Objects

	creating sync.Map // graph.FileID of a file that a command makes an image in: its *creation
}

// New makes a Manager for g.
func New(g *graph.Graph, c Config) *Manager {
	log := cmp.Or(c.Log, slog.Default())
	f, drivers := finder{g}, newCatalog(c.Drivers)
	n := &names{drivers, &records{of: map[weak.Pointer[graph.Node]]*record{}}}
	return &Manager{
		finder: f, catalog: drivers, names: n, planner: &planner{drivers, c.Policy},
		queries: &queries{finder: f, names: n}, bitmaps: bitmaps{f, log},
		log: log, probed: c.Probed, objects: c.Objects,
	}
}

// Graph is the graph whose nodes m manages.
func (m *Manager) Graph() *graph.Graph { return m.g }

func (m *Manager) tellProbed(n *graph.Node) {
	if m.probed != nil {
		m.probed(n)
	}
}

// Add opens the node that o describes, with all that belongs to it, and makes the monitor its owner
// (blockdev-add). It blocks as long as the storage does, but no longer than ctx; on error nothing
// is left behind.
func (m *Manager) Add(ctx context.Context, o *types.BlockdevOptions) error {
	if o.NodeName == nil {
		return errors.New("'node-name' must be specified for the root node")
	}
	p, err := m.plan(o, nil, 0, nil)
	if err != nil {
		return err
	}
	return m.newOpener(ctx).openTop(p, func(tx *graph.Tx, n *graph.Node) error { return tx.Own(n) })
}

// OpenRoot attaches a root to the node that ref names, or to one that it describes, which then is
// opened and lives as long as something refers to it. It blocks like Add; on error nothing is left
// behind. End the root with Graph.CloseRoot.
func (m *Manager) OpenRoot(ctx context.Context, ref *types.BlockdevRef, spec graph.RootSpec) (*graph.Root, error) {
	p, err := m.planRef(ref, nil, 0, nil)
	if err != nil {
		return nil, err
	}
	var root *graph.Root
	err = m.newOpener(ctx).openTop(p, func(tx *graph.Tx, n *graph.Node) (err error) {
		root, err = tx.AttachRoot(spec, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return root, nil
}

// OpenForCreate is OpenRoot with what a driver needs that is about to write an image to a node:
// writing and resizing, which nobody else may do meanwhile, least of all another creation. QEMU
// asks for that only when the header is written.
func (m *Manager) OpenForCreate(ctx context.Context, ref *types.BlockdevRef) (*graph.Root, error) {
	return m.OpenRoot(ctx, ref, graph.RootSpec{
		EdgeName: "root",
		Claim:    perm.Claim{Need: perm.Write | perm.Resize, Share: perm.All &^ (perm.Write | perm.Resize)},
		Kind:     graph.KindBackend,
		Ctx:      ctx,
	})
}

// Del makes the monitor give up a node that it owns and nobody uses, and closes it (blockdev-del).
// It blocks until the node is closed.
func (m *Manager) Del(ctx context.Context, name string) error {
	hold, err := m.g.Hold(ctx, func() ([]*graph.Node, error) {
		n, err := m.Find(name) // first: another may delete it at any time
		if err != nil {
			return nil, err
		}
		tx := m.g.Begin(ctx)
		defer tx.Abort()
		if err := tx.Delete(name); err != nil { // what cannot be is told at once
			return nil, err
		}
		return n.Dependents(), nil
	})
	if err != nil {
		return err
	}
	defer hold.Release() // which closes it
	return m.g.Do(ctx, func(tx *graph.Tx) error { return tx.Delete(name) })
}

// Resize changes the size of a node (block_resize); mode is how space for what is added is
// provided. Requests on the node wait meanwhile.
func (m *Manager) Resize(ctx context.Context, device, node *string, size int64, mode blk.Prealloc) error {
	var n *graph.Node
	hold, err := m.g.Hold(ctx, func() (_ []*graph.Node, err error) {
		n, err = m.Lookup(device, node)
		switch {
		case err != nil:
			return nil, err
		case size < 0:
			return nil, errors.New("Parameter 'size' expects a >0 size")
		case n.Blocked(graph.OpResize) != nil:
			return nil, fmt.Errorf("Device '%s' is in use", n.Name())
		}
		return []*graph.Node{n}, nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	root, err := m.g.AddRoot(ctx, graph.RootSpec{
		EdgeName: "root",
		Claim:    perm.Claim{Need: perm.Resize, Share: perm.All},
		Kind:     graph.KindBackend,
		Ctx:      ctx,
	}, n)
	if err != nil {
		return err
	}
	err = m.resizeDrained(ctx, root, size, mode)
	return errors.Join(err, m.g.CloseRoot(context.WithoutCancel(ctx), root))
}

func (m *Manager) resizeDrained(ctx context.Context, root *graph.Root, size int64, mode blk.Prealloc) error {
	undrain, err := m.g.Drain(ctx, root.Node())
	if err != nil {
		return err
	}
	defer undrain()
	return root.Edge().Resize(ctx, size, false, mode)
}

// SetWriteThreshold sets the offset whose writing raises BLOCK_WRITE_THRESHOLD; 0 is none.
func (m *Manager) SetWriteThreshold(ctx context.Context, name string, t uint64) error {
	var n *graph.Node
	hold, err := m.g.Hold(ctx, func() ([]*graph.Node, error) {
		if n = m.g.Node(name); n == nil {
			return nil, fmt.Errorf("Device '%s' not found", name)
		}
		return []*graph.Node{n}, nil
	})
	if err != nil {
		return err
	}
	defer hold.Release()
	n.IO().SetWriteThreshold(t)
	return nil
}
