package graph

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// Tx collects changes to the graph and makes them all or none. Its methods see the graph
// as the Tx would leave it. Once an action has failed, those after it and Commit fail with
// its error. A Tx is used by one goroutine; after Commit or Abort it is over (Abort after
// Commit does nothing, so it can be deferred). Nothing is reserved before Commit but names.
type Tx struct {
	View // the graph as the Tx would leave it
	planner
	ctx context.Context

	fresh  []*Node // made by NewNode: their names go on Abort
	checks []func() error
	first  []Participant
	last   []Participant
	ending bool  // see Ending
	hold   *Hold // see Under
	missed bool
}

// errTxOver is our own bug, but one that a deferred call may meet.
var errTxOver = errors.New("The transaction is over")

// errClosing is blk.ErrClosed for the whole graph: Graph.Close has begun.
var errClosing = blk.Text("The block layer is shutting down", errors.Join(blk.ErrClosed, syscall.ESHUTDOWN))

// Participant takes part in a commit: Prepare may block and fail; then exactly one of Commit (while
// everything is still drained, after install) and Abort follows. Abort follows a Prepare that
// failed, too, and takes back what that had done by then.
type Participant interface {
	Prepare(ctx context.Context) error
	Commit()
	Abort()
}

// OnCommit is a Participant that has nothing to prepare.
type OnCommit func()

// Prepare implements Participant.
func (OnCommit) Prepare(context.Context) error { return nil }

// Commit implements Participant.
func (f OnCommit) Commit() { f() }

// Abort implements Participant.
func (OnCommit) Abort() {}

// Begin starts a transaction. ctx bounds the waiting in its Commit.
func (g *Graph) Begin(ctx context.Context) *Tx {
	tx := &Tx{planner: planner{g: g}, ctx: ctx}
	tx.View = View{planned{tx}}
	return tx
}

// Graph is the graph that the Tx changes.
func (tx *Tx) Graph() *Graph { return tx.g }

// Context is the one given to Begin.
func (tx *Tx) Context() context.Context { return tx.ctx }

// NewNode reserves the name (generating one if empty) and makes a hidden node. It is
// pinned by its opener until Publish or Discard: other sessions see nothing of it but the
// taken name. Its place in Graph.Nodes is that of this call. Errors: Invalid node-name,
// Node name too long, Duplicate nodes, a name that conflicts with a device id.
func (tx *Tx) NewNode(o *Options) (*Node, error) {
	if err := tx.usable(); err != nil {
		return nil, err
	}
	n := &Node{g: tx.g, pins: 1, applied: perm.Unused}
	n.guard.n, n.io.n, n.bitmaps.n = n, n, n
	n.kids.Store(&noKids)
	n.readOnly.Store(o.ReadOnly)
	n.inactive.Store(o.Inactive)
	n.away = o.Inactive // +checklocksignore: nobody knows it yet
	tx.g.mu.Lock()
	err := tx.g.takeNameLocked(o.Name, n)
	if err == nil {
		tx.g.nodeSeq++
		n.seq = tx.g.nodeSeq
	}
	tx.g.mu.Unlock()
	if err != nil {
		tx.err = err
		return nil, err
	}
	own := *o
	own.Name = n.name
	n.opts.Store(&own)
	n.Bump()
	tx.fresh = append(tx.fresh, n)
	return n, nil
}

// Attach makes child a child of parent. The claim follows from the role or the parent's
// driver. Errors: *perm.CycleError, *perm.DepthError.
func (tx *Tx) Attach(parent *Node, name string, role perm.Role, child *Node) (*Edge, error) {
	e := &Edge{name: name, role: role, pnode: parent}
	e.node.Store(child)
	e.claim.Store(packClaim(perm.Unused))
	err := tx.do(func(d *txDraft) error {
		if err := errors.Join(usable(parent), usable(child)); err != nil {
			return err
		}
		return d.attach(e, parent, child, perm.Unused)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// AttachRoot makes a root on n; requests are possible once the Tx is committed.
func (tx *Tx) AttachRoot(spec RootSpec, n *Node) (*Root, error) {
	if spec.Ctx == nil {
		spec.Ctx = context.Background()
	}
	r := &Root{g: tx.g, spec: spec}
	r.closeGate()
	e := &Edge{name: spec.EdgeName, role: spec.Role, root: r}
	e.node.Store(n)
	e.claim.Store(packClaim(spec.Claim))
	r.edge, r.want = e, spec.Claim // +checklocksignore: nobody knows it yet
	err := tx.do(func(d *txDraft) error {
		if err := usable(n); err != nil {
			return err
		}
		d.prims = append(d.prims, func(in *installer) { in.addRoot(r) }) // +checklocksignore: install calls it
		return d.attach(e, nil, n, d.rootClaim(e, n))
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Detach removes a child edge of a node. Error: the edge is frozen or gone.
func (tx *Tx) Detach(e *Edge) error {
	return tx.do(func(d *txDraft) error {
		if err := d.changeable(e); err != nil {
			return err
		}
		d.detach(e)
		return nil
	})
}

// DetachRoot removes a root. Commit waits until its units of work are over; afterwards Begin fails
// with blk.ErrClosed.
func (tx *Tx) DetachRoot(r *Root) error {
	return tx.do(func(d *txDraft) error {
		if err := d.present(r.edge); err != nil {
			return err
		}
		d.detach(r.edge)
		d.prims = append(d.prims, func(in *installer) { in.removeRoot(r) }) // +checklocksignore: install calls it
		return nil
	})
}

// Replace makes e lead to n. Errors: the edge is frozen or gone, *perm.CycleError,
// *perm.DepthError.
func (tx *Tx) Replace(e *Edge, n *Node) error {
	return tx.do(func(d *txDraft) error {
		if err := d.changeable(e); err != nil {
			return err
		}
		if err := usable(n); err != nil {
			return err
		}
		return d.retarget(e, n)
	})
}

// ReplaceNode moves all parents of old to new, but those that are new itself or below it
// (there would be a cycle) and roots that stay at their node. Error: a frozen edge.
func (tx *Tx) ReplaceNode(old, new *Node) error {
	return tx.do(func(d *txDraft) error { return d.replaceNode(old, new) })
}

// InsertFilter puts top above n: top gets n as a child named edgeName (filtered if top is
// a filter, else COW: an overlay) and takes over n's parents.
func (tx *Tx) InsertFilter(top *Node, edgeName string, n *Node) (*Edge, error) {
	e := &Edge{name: edgeName, role: perm.COW, pnode: top}
	if top.Kind() == Filter {
		e.role = perm.Filtered | perm.Primary
	}
	e.node.Store(n)
	e.claim.Store(packClaim(perm.Unused))
	err := tx.do(func(d *txDraft) error {
		if err := errors.Join(usable(top), usable(n)); err != nil {
			return err
		}
		if err := d.attach(e, top, n, perm.Unused); err != nil {
			return err
		}
		return d.replaceNode(n, top)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// RemoveFilter moves the parents of top to its filtered or COW child and detaches that
// child. Error: a frozen edge.
func (tx *Tx) RemoveFilter(top *Node) error {
	return tx.do(func(d *txDraft) error {
		e := View{d}.FilterOrCOWChild(top)
		if e == nil {
			return fmt.Errorf("Node '%s' has nothing below it to replace it by", top.name)
		}
		below := d.Target(e)
		if err := d.changeable(e); err != nil {
			return err
		}
		d.detach(e)
		return d.replaceNode(top, below)
	})
}

// SetClaim changes what a root takes on its node, or will take once that is active.
func (tx *Tx) SetClaim(e *Edge, c perm.Claim) error {
	if e.root == nil {
		panic("graph: SetClaim: the claims of nodes follow from their parents")
	}
	return tx.do(func(d *txDraft) error {
		if err := d.present(e); err != nil {
			return err
		}
		d.wants[e] = c
		d.prims = append(d.prims, func(*installer) { e.root.want = c })
		d.SetClaim(e, d.rootClaim(e, d.Target(e)))
		return nil
	})
}

// SetReadOnly changes whether n refuses writes; n is drained meanwhile.
func (tx *Tx) SetReadOnly(n *Node, ro bool) error {
	return tx.do(func(d *txDraft) error {
		st := d.Node(n)
		st.ReadOnly, st.NoWriters = ro, nil
		d.SetNode(n, st)
		d.drains = append(d.drains, n)
		own := *d.options(n)
		own.ReadOnly, own.Inherited.ReadOnly = ro, &ro
		d.prims = append(d.prims, func(in *installer) { n.readOnly.Store(ro); n.noWriters = nil })
		d.setLent(n, false)
		d.setOptions(n, &own) // last, as it tells of both
		return nil
	})
}

// SetLent tells whether n, which is writable, is so for a time only: what is recorded of it then is
// that it is read-only. SetReadOnly ends that.
func SetLent(tx *Tx, n *Node, lent bool) error {
	return tx.do(func(d *txDraft) error {
		d.Touch(n)
		d.setLent(n, lent)
		return nil
	})
}

// BarWriters lets nobody write to n any more, which is writable, until SetReadOnly: why is the
// error that they get. Whoever writes already makes Commit fail. nil ends that.
func (tx *Tx) BarWriters(n *Node, why error) error {
	return tx.do(func(d *txDraft) error {
		st := d.Node(n)
		st.NoWriters = why
		d.SetNode(n, st)
		d.prims = append(d.prims, func(in *installer) { n.noWriters = why })
		return nil
	})
}

// SetOptions replaces the options of n on commit; n is drained meanwhile and its limits are
// read anew. Name and what says what the driver is stay; use SetReadOnly for ReadOnly.
func (tx *Tx) SetOptions(n *Node, o *Options) error {
	own := *o
	was := n.Options()
	own.Name, own.DriverName, own.Kind, own.Reopens = n.name, was.DriverName, was.Kind, was.Reopens
	return tx.do(func(d *txDraft) error {
		st := d.Node(n)
		st.ForceShare = own.ForceShare
		d.SetNode(n, st)
		for e := range d.Parents(n) {
			if e.pnode != nil {
				d.Touch(e.pnode) // what it shares may follow force-share
			}
		}
		d.drains = append(d.drains, n)
		d.setOptions(n, &own)
		d.prims = append(d.prims, func(in *installer) { in.reopened = append(in.reopened, n) })
		return nil
	})
}

// Refresh settles the claims of n on its children anew and tells n's driver the claims on
// itself even if they did not change.
func (tx *Tx) Refresh(n *Node) error {
	return tx.do(func(d *txDraft) error {
		d.Touch(n)
		d.again[n] = true
		return nil
	})
}

// Own makes the monitor an owner of n.
func (tx *Tx) Own(n *Node) error {
	return tx.do(func(d *txDraft) error {
		if err := usable(n); err != nil {
			return err
		}
		d.ref(n).owned = true
		return nil
	})
}

// Publish makes n and the hidden nodes below it visible and drops their opener's pins, so
// that from commit on they live as long as the monitor or a parent refers to them.
func (tx *Tx) Publish(n *Node) error {
	return tx.do(func(d *txDraft) error {
		d.eachHidden(n, func(h *Node) {
			r := d.ref(h)
			r.pins--
			r.publish = true
			d.Touch(h)
		})
		return nil
	})
}

// Discard drops the opener's pins of n and of the hidden nodes below it: they are closed on commit.
func (tx *Tx) Discard(n *Node) error {
	return tx.do(func(d *txDraft) error {
		d.eachHidden(n, func(h *Node) { d.ref(h).pins-- })
		return nil
	})
}

// Keep keeps n in the graph from the commit of tx on, as its opener does, until release is called:
// without being a parent. release may wait for a moment.
func Keep(tx *Tx, n *Node) (release func(), err error) {
	err = tx.do(func(d *txDraft) error {
		d.ref(n).pins++
		return usable(n) // +checklocksignore: do holds tx.g.mu
	})
	return func() {
		tx := n.g.Begin(context.Background())
		tx.Ending()
		ignoreClosing(tx.do(func(d *txDraft) error { d.ref(n).pins--; return nil }))
		ignoreClosing(tx.Commit())
	}, err
}

// Delete disowns the node of that name under the rules of blockdev-del. Errors, in this
// order: unknown, used by a backend, blocked, not owned by the monitor, in use.
func (tx *Tx) Delete(name string) error {
	return tx.do(func(d *txDraft) error {
		n := tx.g.names[name].node
		if n == nil || n.state != nodePublished {
			return fmt.Errorf("Failed to find node with node-name='%s'", name)
		}
		users := 0
		for e := range d.Parents(n) {
			users++
			if e.root != nil && e.root.spec.Kind == KindBackend {
				return fmt.Errorf("Node %s is in use", name)
			}
		}
		if err := n.blockedLocked(OpDriveDel); err != nil { // +checklocksignore: do holds tx.g.mu
			return err
		}
		r := d.ref(n)
		if !r.owned {
			return fmt.Errorf("Node %s is not owned by the monitor", name)
		}
		if users > 0 || n.pins+r.pins > 0 {
			return fmt.Errorf("Block device %s is in use", name)
		}
		r.owned = false
		return nil
	})
}

// Drain keeps n quiet during the commit although no edge above it changes.
func (tx *Tx) Drain(n *Node) error {
	return tx.do(func(d *txDraft) error { d.drains = append(d.drains, n); return nil })
}

// Check makes Commit call f with the nodes reserved but not yet drained, with no lock held; an
// error ends the Tx. For conditions that must still hold at commit, such as Blocked.
func (tx *Tx) Check(f func() error) { tx.checks = append(tx.checks, f) }

// Join adds a participant that is prepared after the permissions; aborts run in reverse.
func (tx *Tx) Join(p Participant) { tx.last = append(tx.last, p) }

// JoinFirst adds a participant that is prepared before the permissions (a reopen that makes the new
// file descriptor).
func (tx *Tx) JoinFirst(p Participant) { tx.first = append(tx.first, p) }

// Abort forgets the Tx and gives back the names it took. Nodes made by it that got a driver must
// have been closed by their opener.
func (tx *Tx) Abort() {
	if tx.over {
		return
	}
	tx.over = true
	tx.forgetFresh()
}

// forgetFresh gives back the names of nodes that never became part of the graph.
func (tx *Tx) forgetFresh() {
	if len(tx.fresh) == 0 {
		return
	}
	tx.g.mu.Lock()
	defer tx.g.mu.Unlock()
	for _, n := range tx.fresh {
		delete(tx.g.names, n.name)
		n.state = nodeClosed
	}
}

// usable refuses nodes that are going or have gone.
func usable(n *Node) error {
	if n.state >= nodeClosing {
		return fmt.Errorf("Cannot find device='' nor node-name='%s'", n.name)
	}
	return nil
}
