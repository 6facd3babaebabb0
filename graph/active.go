package graph

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// An inactive node has left its image to others, to another process as a rule: it takes no claims,
// holds no locks and writes nothing. What its driver remembers of the image may be wrong by then,
// until it is active again and everything was read anew. So images go from one process to another
// and back while both have them open:
//
//	active --store, flush--> claims and locks go --> inactive --locks, read again--> active
//
// No active node has an inactive child: parents leave first and come back last.

// Inactive tells whether n is inactive.
func (n *Node) Inactive() bool { return n.inactive.Load() }

// WasInactive tells whether n is inactive, or was so since it was opened.
func WasInactive(n *Node) bool {
	n.g.mu.RLock()
	defer n.g.mu.RUnlock()
	return n.away
}

var (
	errActiveParent = errors.New("Node has active parent node")
	errStaysActive  = blk.Text("Failed to inactivate node: Operation not permitted", syscall.EPERM)
)

// bothActive refuses an inactive node below an active one.
func (d *txDraft) bothActive(e *Edge, child *Node) error {
	if e.pnode == nil || !d.Node(child).Inactive || d.Node(e.pnode).Inactive {
		return nil
	}
	return &InactiveChildError{child.name, e.name, e.pnode.name}
}

// InactiveChildError: an inactive node would be below an active one.
type InactiveChildError struct{ Child, Role, Parent string }

func (e *InactiveChildError) Error() string {
	return fmt.Sprintf("Inactive '%s' can't be a %s child of active '%s'", e.Child, e.Role, e.Parent)
}

// yields tells whether a root that wants c lets its node become inactive. What jobs do would be
// wrong from then on, even if they only read.
func (r *Root) yields(c perm.Claim) bool {
	return r.spec.AllowInactive || !r.spec.Job && c.Need&perm.Changes == 0
}

// rootClaim is what the root of e claims of n.
func (d *txDraft) rootClaim(e *Edge, n *Node) perm.Claim {
	want := d.want(e)
	if d.Node(n).Inactive && e.root.yields(want) {
		return perm.Unused
	}
	return want
}

// want is Root.want of the root of e.
func (d *txDraft) want(e *Edge) perm.Claim {
	if c, set := d.wants[e]; set {
		return c
	}
	return e.root.want
}

// SetInactive changes whether n is inactive: no writes, no claims, no locks. n is drained
// meanwhile. Errors: a parent, or a child, is in the way; that of a root that writes.
func (tx *Tx) SetInactive(n *Node, inactive bool) error {
	return tx.do(func(d *txDraft) error {
		st := d.Node(n)
		st.Inactive = inactive
		d.SetNode(n, st)
		for e := range d.Parents(n) {
			switch {
			case e.pnode != nil && inactive && !d.Node(e.pnode).Inactive:
				return errActiveParent
			case e.root != nil && inactive && !e.root.yields(d.want(e)):
				return errStaysActive
			case e.root != nil:
				d.SetClaim(e, d.rootClaim(e, n))
			}
		}
		for _, e := range d.Children(n) {
			if err := d.bothActive(e, d.Target(e)); err != nil {
				return err
			}
		}
		d.drains = append(d.drains, n)
		d.prims = append(d.prims, func(in *installer) {
			n.inactive.Store(inactive)
			n.away = true
			in.reopened = append(in.reopened, n)
			n.Bump()
		})
		return nil
	})
}

// Deactivate makes nodes inactive, and with each what is below it and is not used otherwise. The
// caller holds all of these (Hold). On error all are as they were. It blocks as long as requests
// under way and the storage do.
func Deactivate(ctx context.Context, nodes ...*Node) error {
	return handOver(ctx, nodes, func(h *handover, n *Node) error { return h.leave(ctx, n, true) })
}

// Activate makes nodes active again, and all that is below them. The rest is as for Deactivate.
func Activate(ctx context.Context, nodes ...*Node) error {
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n *Node) bool { return !n.Inactive() })
	return handOver(ctx, nodes, func(h *handover, n *Node) error { return h.comeBack(ctx, n) })
}

// handover is a change of several nodes, one after the other.
type handover struct {
	done []*Node
	undo func(ctx context.Context, n *Node) error
}

func handOver(ctx context.Context, nodes []*Node, change func(h *handover, n *Node) error) error {
	var all []*Node
	for _, n := range nodes {
		all = append(all, n.NodesBelow()...)
	}
	if len(all) == 0 {
		return nil
	}
	undrain, err := nodes[0].g.Drain(ctx, unique(all)...)
	if err != nil {
		return err
	}
	defer undrain()
	h := &handover{}
	for _, n := range nodes {
		if err = change(h, n); err != nil {
			break
		}
	}
	if err != nil {
		for _, n := range slices.Backward(h.done) {
			if e := h.undo(context.WithoutCancel(ctx), n); e != nil {
				slog.Error("a node cannot be made active or inactive again, as it was", "node", n.name, "error", e)
			}
		}
	}
	return err
}

// leave makes n inactive, then what is below it.
func (h *handover) leave(ctx context.Context, n *Node, asked bool) error {
	h.undo = activate
	if n.Inactive() {
		return nil
	}
	err := deactivate(ctx, n)
	if err == errActiveParent && !asked {
		return nil // it will follow that one
	}
	if err != nil {
		return err
	}
	h.done = append(h.done, n)
	for _, e := range n.Children() {
		if err := h.leave(ctx, e.Node(), false); err != nil {
			return err
		}
	}
	return nil
}

// comeBack makes what is below n active, then n. What was active below an inactive node, as what is
// opened for one is, may have been changed by others all the same: unless somebody uses it here, it
// leaves for a moment to be read again.
func (h *handover) comeBack(ctx context.Context, n *Node) error {
	h.undo = deactivate
	was := n.Inactive()
	if !was {
		switch err := deactivate(ctx, n); {
		case err == errActiveParent, err == errStaysActive:
			return nil // it has followed, or made, all changes
		case err != nil:
			return err
		}
	}
	for _, e := range n.Children() {
		if err := h.comeBack(ctx, e.Node()); err != nil {
			return err
		}
	}
	if err := activate(ctx, n); err != nil {
		return err
	}
	if was {
		h.done = append(h.done, n)
	}
	return nil
}

func deactivate(ctx context.Context, n *Node) error {
	return n.g.Do(ctx, func(tx *Tx) error {
		tx.JoinFirst(&leaving{n: n})
		return tx.SetInactive(n, true)
	})
}

func activate(ctx context.Context, n *Node) error {
	c := &comingBack{n: n}
	err := n.g.Do(ctx, func(tx *Tx) error {
		tx.Join(c)
		return tx.SetInactive(n, false)
	})
	if err != nil {
		return err
	}
	if c.err != nil { // the driver has stayed as it was; the node follows
		return errors.Join(c.err, deactivate(context.WithoutCancel(ctx), n))
	}
	n.Resized()
	return nil
}

// leaving stores what must be stored, before claims and locks go.
type leaving struct {
	n      *Node
	stored bool
}

func (c *leaving) Prepare(ctx context.Context) error {
	n, r := c.n, &blk.Req{Ctx: ctx}
	if j, ok := n.drv.(Ejecter); ok && j.Ejected() {
		return blk.Errnof(blk.ErrNoMedium, "Failed to inactivate node")
	}
	for _, d := range n.bitmaps.All() {
		if d.Persistent() && d.Busy() {
			return d.Check(BitmapRead)
		}
	}
	if n.ReadOnly() {
		return nil
	}
	if d, ok := n.drv.(ModeSwitcher); ok {
		c.stored = true
		if err := n.Guarded(func() error { return d.PrepareReadOnly(r, true) }); err != nil {
			return fmt.Errorf("Failed to inactivate node: %w", err)
		}
	}
	if err := n.io.flushNode(r); err != nil {
		return blk.Errnof(err, "Failed to inactivate node")
	}
	return nil
}

func (c *leaving) Commit() {
	n, r := c.n, &blk.Req{Ctx: context.Background()}
	if d, ok := n.drv.(ModeSwitcher); ok && !n.ReadOnly() {
		// Nothing is left that could fail: it stops writing.
		_ = n.Guarded(func() error { return d.CommitReadOnly(r, true) })
	}
	if d, ok := n.drv.(Deactivator); ok {
		_ = n.Guarded(func() error { d.Deactivated(); return nil })
	}
}

func (c *leaving) Abort() {
	if !c.stored {
		return
	}
	d, r := c.n.drv.(ModeSwitcher), &blk.Req{Ctx: context.Background()}
	if err := c.n.Guarded(func() error { return d.CommitReadOnly(r, false) }); err != nil {
		// Its bitmaps would be taken to be whole, and writes go on.
		c.n.Fail(fmt.Errorf("Node '%s' cannot take back what it did to become inactive: %w", c.n.name, err))
	}
}

// comingBack reads again what others may have changed, with all locks taken, and then has the
// driver write.
type comingBack struct {
	n   *Node
	err error
}

func (c *comingBack) Prepare(ctx context.Context) error {
	n, r := c.n, &blk.Req{Ctx: ctx}
	if d, ok := n.drv.(Activator); ok {
		if err := n.Guarded(func() error { return d.Activate(r) }); err != nil {
			return err
		}
	}
	if d, ok := n.drv.(ModeSwitcher); ok && !n.ReadOnly() {
		return n.Guarded(func() error { return d.PrepareReadOnly(r, false) })
	}
	return nil
}

func (c *comingBack) Commit() {
	n, r := c.n, &blk.Req{Ctx: context.Background()}
	if d, ok := n.drv.(ModeSwitcher); ok && !n.ReadOnly() {
		c.err = n.Guarded(func() error { return d.CommitReadOnly(r, false) })
	}
}

func (c *comingBack) Abort() {
	if d, ok := c.n.drv.(Deactivator); ok {
		_ = c.n.Guarded(func() error { d.Deactivated(); return nil })
	}
}
