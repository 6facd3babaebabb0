// Package visible is what clients of QEMU are used to see of jobs, and when, beyond the plain
// course of a job's life: who is paused in passing, and what comes before the answer to a command
// or after it. It is data, recorded from QEMU (the conversations of tests/conv hold most of it); no
// lock, no clock, no I/O. Package jobs does what it says; those who cause it name the moment, the
// verb or the disks.
package visible

import (
	"math"
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

// Whom a moment concerns.
type Whom uint8

const (
	All  Whom = iota // all jobs
	Near             // those that reach one of the moment's nodes
)

// Pause is who is seen to pause at a moment, and how many times in a row.
type Pause struct {
	Whom  Whom
	Pairs int
}

var pauses = [moments]Pause{
	TransactionBegins: {All, 1},
	TransactionEnds:   {Near, 1},
	NodeReopened:      {Near, 1},
	HeaderSwitched:    {Near, 1},
	NodeProbed:        {Near, 2},
	ExportLeft:        {Near, 2},
	StreamEntered:     {Near, 1},
	StreamRefused:     {Near, 1},
	StreamLeft:        {Near, 2},
	StreamCut:         {Near, 2},
	StreamFailed:      {Near, 3},
	CommitLeft:        {Near, 1},
	BackupLeft:        {Near, 1},
	DaemonEnds:        {All, 1},
}

// At is who pauses at a moment.
func At(m Moment) Pause { return pauses[m] }

// Job is a kind of job as clients tell them apart: a QAPI JobType, or ActiveCommit.
type Job string

const (
	Backup       Job = "backup"
	Mirror       Job = "mirror"
	ActiveCommit Job = "active commit" // a block-commit that works like a mirror
)

// Answer is a verb whose answer comes before what the job does then: it is neither ready nor over
// earlier. Was it cancelled by force, it is over when the client's next command is executed. With
// all other jobs and verbs what the job does at once comes before the answer: it pauses, goes on or
// ends, if it was doing nothing else.
type Answer struct {
	Job  Job
	Verb machine.Verb
}

var first = []Answer{
	{Mirror, machine.Cancel},
	{Mirror, machine.Complete},
	{Mirror, machine.Resume},
	{ActiveCommit, machine.Cancel},
	{ActiveCommit, machine.Complete},
	{ActiveCommit, machine.Resume},
}

// AnswerFirst tells whether a verb is answered before what the job does then.
func AnswerFirst(j Job, v machine.Verb) bool {
	for _, a := range first {
		if a == (Answer{j, v}) {
			return true
		}
	}
	return false
}

// Start is a job that gets as far as its first wait before the command that starts it is answered,
// instead of to its first I/O, if its disks answer at once and have no more than Most bytes.
// Nothing: also if there is nothing to copy, on whatever disks.
type Start struct {
	Job     Job
	Most    int64
	Nothing bool
}

// inOneGo is what QEMU's mirror has in flight.
const inOneGo = 16 << 20

var starts = []Start{
	{Backup, math.MaxInt64, false},
	{Mirror, inOneGo, true},
	{ActiveCommit, inOneGo, true},
}

// Disks are what a job is about to work on.
type Disks struct {
	AtOnce  bool // they never wait for anything
	Size    int64
	Nothing bool // nothing is to be copied
}

// StartFirst tells whether a job gets to its first wait before its command is answered.
func StartFirst(j Job, d Disks) bool {
	for _, s := range starts {
		if s.Job == j {
			return s.Nothing && d.Nothing || d.AtOnce && d.Size <= s.Most
		}
	}
	return false
}

// ShownPaused tells whether query-block-jobs says that a job is paused which is not: a mirror that
// waits for its end holds its source quiet.
func ShownPaused(j Job, s machine.Status) bool {
	return (j == Mirror || j == ActiveCommit) && (s == machine.Waiting || s == machine.Pending)
}

// How long commands wait at most for what comes before their answer, and jobs, for EndLimit, for
// what comes after it; in real time, as a client waits.
const (
	StartLimit = 200 * time.Millisecond // for the first wait of a job
	EndLimit   = 100 * time.Millisecond // for the end of a job that was doing nothing
	OverLimit  = time.Second            // for that of one whose work is over: storage may be in its way
)
