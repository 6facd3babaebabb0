// Package graph is the block graph: nodes, the edges between them, the roots where requests
// enter, and the transactions that change all this under load. A Node is the one front end to its
// Driver: what requests have to go through lies in the io_*.go files, what changes and
// observes the graph in the others.
//
//	Root ---edge---> Node (qcow2) ---"file"---> Node (file)
//	gate             Driver       \--"backing"-> Node (qcow2) ---"file"---> Node (file)
//
// # Changing the graph
//
// Holding a *Tx is the right to change the graph. Its actions are kept as a list and tried
// out on a draft, so the Tx reads its own writes and nobody else sees them. Commit then runs
//
//	plan     the draft is made anew on the graph as it is; package perm settles and checks the claims
//	reserve  the nodes whose edges, claims or state change: all at once, first come first served;
//	         if the plan then touches more, release and start over. Nobody waits for a reservation
//	         while holding one
//	checks   conditions that must still hold (Tx.Check)
//	drain    the upper ends of changed edges; new edges of a hidden node need none, nor does
//	         gaining a parent
//	prepare  participants and drivers: image locks, header writes. May block and fail
//	record   what changes is told to the Recorder, as values. It may refuse, or block
//	install  under g.mu; cannot fail, does not wait
//	finish   drivers and participants commit, undrain, release; nodes that lost
//	         their last reference are flushed and closed
//
// A failure before install undoes everything in reverse. Waiting ends with the context of the Tx.
// Transactions on disjoint nodes never wait for each other; queries read under g.mu and wait for no
// commit.
//
// # Commands and the ends of jobs
//
// A transaction keeps others off what it changes in the graph. What is in a node (snapshots,
// bitmaps, size, header, options) is kept for one command, or for the end of one job, by a Hold,
// from its first look to its last write:
//
//	Hold     all nodes at once, with those that their data lie in; then names are looked up again
//	drain    and transactions, as many as it takes: none of them needs the Hold
//	Release  closes nodes that lost their last reference meanwhile
//
// A Hold is waited for by who has neither a Hold, a reservation nor a closed gate that others need,
// so that waits go one way: Hold, reservation, drain, storage.
//
// # Life of a node
//
//	NewNode ---> hidden ---Publish---> published ---last reference gone---> closing ---> closed
//	               \-----------------Discard, failed commit-----------------/
//
// References are the monitor (Own), parents, and the opener's pin until Publish or Discard. A
// hidden or closing node has no other appearance than its taken name.
//
// # Draining
//
// A node is quiet while its quiesce count is not 0: the drains of the node itself, plus its
// child edges that lead to quiet nodes. A root's gate is closed by the same rule. So the
// parents of a quiet node are quiet by construction, also those that it gets later.
// A drain closes gates first and then waits, with no lock held: for the units of work in
// flight and for every Drainer to be quiet. A unit of work passes its gate once; whatever it
// does inside meets no gate. Requests never drain, and take no lock of the graph (but
// Node.Resized, which some writes call at their end, takes g.mu for reading).
//
// # Locks
//
// In this order; what stands further right is taken later, never the other way round:
//
//	drainerState.mu > g.mu > jobs.mu > node locks of the data plane
//	                               > driver locks (their own package docs) > events.mu, session.outMu
//	               g.mu > Root.wait
//	Record.mu > g.mu
//
//	g.resv.mu, g.holds.mu, g.genMu, Root.wait  leaves: code under them takes no further lock
//	trackShard.mu (in index order),
//	flushState.mu, Bitmaps.mu                  likewise, per node; requests hold them but for moments
//	events.mu, session.outMu                   leaves: code under them calls nothing of ours
//
// Exceptions: drainerState.mu is held while a Drainer is called, which may take driver and job
// locks, but never enters this package's Drain or Commit. Under g.mu drivers are asked only Caps,
// Size and EdgeClaim, which take at most a leaf lock of theirs. No lock of this package is held
// across I/O, PermTaker, Participant or Recorder calls, but for Record.mu, across those of the
// Recorder. Reservations are not locks: they are waited for with no lock and no unit of work held.
//
// Built with -tags invariants, each install checks the nodes it touched.
package graph
