// Package jobs runs long operations on the block graph: one manager, one state machine (package
// machine), job transactions that end together, pause points, speed limits, error policies, and the
// events and answers that clients see (what clients of QEMU are used to is data, in package
// visible).
//
// A job's work is a Runner. It runs in one goroutine of its own, from Start to the end of the
// transaction that it belongs to:
//
//	Create --> Start --> Run ... Checkpoint ... --> waiting for its transaction
//	                                                   | all done          | one failed
//	                                                   v                   v
//	                                  Prepare, Commit, Clean        Abort, Clean
//
// Locks: Manager.mu guards every job's state and is held for moments only, never across a call
// into a Runner. A transaction's turn (Txn.turn) serialises what ends its jobs; it is taken before
// Manager.mu and held across the runners' Prepare, Commit, Abort and Clean.
package jobs
