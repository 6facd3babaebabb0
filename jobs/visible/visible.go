// Package visible is what clients of QEMU are used to see of jobs, and when, beyond the plain
// course of a job's life: who is paused in passing, and what comes before the answer to a command
// or after it. It is data and predicates, recorded from QEMU (the conversations of tests/conv hold
// most of it); no lock, no clock, no I/O. Package jobs does what it says; those who cause it name
// the moment, the verb or the disks.
package visible

import (
	"time"

	"qblockd/jobs/machine"
)

// Moment is when QEMU quiesces nodes. Jobs that are at work are seen to pause and to go on then
// (`paused running` or `standby ready`), as often as it does so.
type Moment uint8

const (
	TransactionBegins Moment = iota // also of a command that could be a step of one
	TransactionEnds                 // well or not; the nodes of the steps that had their turn
	NodeReopened                    // or not; what is below the nodes of blockdev-reopen, before and after
	ChildrenChanged                 // the node that got a child or lost one
	HeaderSwitched                  // what is below an image, writable for its header
	NodeProbed                      // the node under a new one: once with its request queue, once with the node
	ExportLeft                      // its node; as NodeProbed
	StreamEntered                   // its top, when the filter is in
	StreamRefused                   // its top, when the filter goes as there can be no job
	StreamLeft                      // its top, in success
	StreamCut                       // what was below its top
	StreamFailed                    // its top
	CommitLeft                      // what was below the filter, in success
	BackupLeft                      // its source, however it ends
	DaemonEnds                      // one goes on just before it is cancelled
	moments
)

var pairs = [moments]int{
	TransactionBegins: 1,
	TransactionEnds:   1,
	NodeReopened:      1,
	ChildrenChanged:   1,
	HeaderSwitched:    1,
	NodeProbed:        2,
	ExportLeft:        2,
	StreamEntered:     1,
	StreamRefused:     1,
	StreamLeft:        2,
	StreamCut:         2,
	StreamFailed:      3,
	CommitLeft:        1,
	BackupLeft:        1,
	DaemonEnds:        1,
}

// Pairs is how many times in a row jobs are seen to pause at a moment.
func (m Moment) Pairs() int { return pairs[m] }

// All tells whether a moment concerns all jobs; else it is those that reach one of its nodes.
func (m Moment) All() bool { return m == TransactionBegins || m == DaemonEnds }

// Job is a kind of job as clients tell them apart: a QAPI JobType, or ActiveCommit.
type Job string

const (
	Backup       Job = "backup"
	Mirror       Job = "mirror"
	ActiveCommit Job = "active commit" // a block-commit that works like a mirror
)

// mirrors tells whether a job works like a mirror.
func (j Job) mirrors() bool { return j == Mirror || j == ActiveCommit }

// AnswerFirst tells whether a verb is answered before what the job does then: it is neither ready
// nor over earlier. Was it cancelled by force, it is over when the client's next command is
// executed. With all other jobs and verbs what the job does at once comes before the answer: it
// pauses, goes on or ends, if it was doing nothing else.
func AnswerFirst(j Job, v machine.Verb) bool {
	return j.mirrors() && (v == machine.Cancel || v == machine.Complete || v == machine.Resume)
}

// inOneGo is what QEMU's mirror has in flight.
const inOneGo = 16 << 20

// Disks are what a job is about to work on.
type Disks struct {
	AtOnce  bool // they never wait for anything
	Size    int64
	Nothing bool // nothing is to be copied
}

// StartFirst tells whether a job gets as far as its first wait before the command that starts it is
// answered, instead of to its first I/O: if its disks answer at once, and a mirror also if there is
// nothing to copy, on whatever disks, but not if they are longer than inOneGo.
func StartFirst(j Job, d Disks) bool {
	return j == Backup && d.AtOnce || j.mirrors() && (d.Nothing || d.AtOnce && d.Size <= inOneGo)
}

// ShownPaused tells whether query-block-jobs says that a job is paused which is not: a mirror that
// waits for its end holds its source quiet.
func ShownPaused(j Job, s machine.Status) bool {
	return j.mirrors() && (s == machine.Waiting || s == machine.Pending)
}

// How long commands wait at most for what comes before their answer, and jobs, for EndLimit, for
// what comes after it; in real time, as a client waits.
const (
	StartLimit = 200 * time.Millisecond // for the first wait of a job
	EndLimit   = 100 * time.Millisecond // for the end of a job that was doing nothing
	OverLimit  = time.Second            // for that of one whose work is over: storage may be in its way
)
