package meta

import (
	"errors"
	"path/filepath"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/daemon"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// guest uses an image. Its I/O methods are for one goroutine; another makes itself another by
// another.
type guest interface {
	read(p []byte, off int64) error
	write(p []byte, off int64, fua bool) error
	zero(off int64, n int, unmap bool) error
	discard(off int64, n int) error
	flush() error
	another() (guest, error)
	// close ends this use; the last one ends the guest.
	close() error
}

// rootGuest is a backend.
type rootGuest struct {
	root   *graph.Root
	w      *world
	shared bool
}

func (g *rootGuest) do(f func(r *blk.Req) error) error {
	r, err := g.root.Begin(g.w.ctx)
	if err != nil {
		return err
	}
	defer g.root.End(r)
	return f(r)
}

// try is do for what changes the disk.
func (g *rootGuest) try(f func(r *blk.Req) error) error {
	return g.w.faults.try(func() error { return g.do(f) })
}

func (g *rootGuest) read(p []byte, off int64) error {
	return g.do(func(r *blk.Req) error { return g.root.ReadAt(r, blk.Buf(p), off, 0) })
}

func (g *rootGuest) write(p []byte, off int64, fua bool) error {
	f := blk.Flags(0)
	if fua {
		f = blk.FUA
	}
	return g.try(func(r *blk.Req) error { return g.root.WriteAt(r, blk.Buf(p), off, f) })
}

func (g *rootGuest) compressed(p []byte, off int64) error {
	return g.do(func(r *blk.Req) error { return g.root.WriteAt(r, blk.Buf(p), off, blk.Compressed) })
}

func (g *rootGuest) zero(off int64, n int, unmap bool) error {
	f := blk.Flags(0)
	if unmap {
		f = blk.MayUnmap
	}
	return g.try(func(r *blk.Req) error { return g.root.Zero(r, off, int64(n), f) })
}

func (g *rootGuest) discard(off int64, n int) error {
	return g.try(func(r *blk.Req) error { return g.root.Discard(r, off, int64(n)) })
}

func (g *rootGuest) flush() error { return g.do(g.root.Flush) }

func (g *rootGuest) another() (guest, error) {
	return &rootGuest{root: g.root, w: g.w, shared: true}, nil
}

func (g *rootGuest) close() error {
	if g.shared {
		return nil
	}
	return g.root.Graph().CloseRoot(g.w.ctx, g.root)
}

// nbdGuest is a client of an export.
type nbdGuest struct {
	w      *world
	id     string
	c      *daemon.NBD
	shared bool
}

func (g *nbdGuest) read(p []byte, off int64) error { return g.c.ReadAt(p, off) }

func (g *nbdGuest) write(p []byte, off int64, fua bool) error {
	return g.w.faults.try(func() error {
		if fua {
			return g.c.WriteFUA(p, off)
		}
		return g.c.WriteAt(p, off)
	})
}

func (g *nbdGuest) zero(off int64, n int, unmap bool) error {
	return g.w.faults.try(func() error {
		if unmap {
			return g.c.Zero(off, n)
		}
		return g.c.ZeroNoHole(off, n)
	})
}

func (g *nbdGuest) discard(off int64, n int) error {
	return g.w.faults.try(func() error { return g.c.Trim(off, n) })
}
func (g *nbdGuest) flush() error { return g.c.Flush() }

func (g *nbdGuest) another() (guest, error) {
	c, err := daemon.DialNBD(g.w.socket(), g.id)
	return &nbdGuest{w: g.w, id: g.id, c: c, shared: true}, err
}

func (g *nbdGuest) close() error {
	g.c.Close()
	if g.shared {
		return nil
	}
	return g.w.x.Exports.Del(g.w.ctx, g.id, types.BlockExportRemoveModeHard)
}

func (w *world) socket() string { return filepath.Join(w.dir, "nbd.sock") }

// attach gives an image a guest, or tries a second one.
func (o *op) attach(m *image) {
	if m.closed {
		return
	}
	n := o.mustNode(m)
	write := o.A%4 != 0
	if m.guest != nil || m.ro && write && o.busy(m) {
		return // a job may have made it writable
	}
	fails := ""
	if m.ro && write {
		fails = "it is read-only"
	}
	kind, guestOf := "backend", o.backend
	if o.B%2 != 0 {
		kind, guestOf = "export", o.export
	}
	g, err := guestOf(n, write)
	o.did("attach %s to %s, writable %v: %s %v", kind, n.Name(), write, fails, err)
	if err != nil && o.busyFrom(m) {
		return // the job does not let it
	}
	if expect(err, fails) {
		return
	}
	m.guest, m.canSet = g, write
}

// backend is a guest in this process.
func (w *world) backend(n *graph.Node, write bool) (guest, error) {
	root, err := w.x.AttachRoot(w.ctx, n, !write)
	return &rootGuest{root: root, w: w}, err
}

// reading has f look at n as a guest.
func (w *world) reading(n *graph.Node, f func(guest)) {
	g := trial.Get(w.backend(n, false))
	f(g)
	trial.Must(g.close())
}

func (o *op) export(n *graph.Node, write bool) (guest, error) {
	id := o.unique("e")
	err := o.x.Exports.Add(o.ctx, &types.BlockExportOptions{
		Type: types.BlockExportTypeNbd, ID: id, NodeName: n.Name(), Writable: &write, Writethrough: rig.Ptr(o.C%4 == 0),
		U: &types.BlockExportOptionsNbd{Name: &id},
	})
	if err != nil {
		return nil, err
	}
	c, err := daemon.DialNBD(o.socket(), id)
	return &nbdGuest{w: o.world, id: id, c: c}, err
}

// detach takes an image's guest away.
func (w *world) detach(m *image) {
	if m.guest == nil {
		return
	}
	w.joined(m)
	w.did("detach from %s", m.name())
	g := m.guest
	m.guest, m.canSet = nil, false
	trial.Must(g.close())
}

// passGuest gives the guest of m to another image.
func (m *image) passGuest(to *image) {
	to.guest, to.canSet = m.guest, m.canSet
	m.guest, m.canSet = nil, false
}

// writable tells whether m's guest may write to it now.
func (w *world) writable(m *image) bool {
	return m.guest != nil && m.canSet && len(w.dependents(m, false)) == 0
}

// isIO tells errors that a guest gets from those of this package.
func isIO(err error) bool {
	var e syscall.Errno
	return errors.As(err, &e) || errors.Is(err, blk.ErrNotSupported)
}
