package mirror

import (
	"fmt"
	"sync/atomic"
	"time"

	"qblockd/schema/types"
)

// phase is where the life of a job stands:
//
//	           nothing is dirty          its transaction ends
//	copying -------------------> ready ----------------------> ending
//	   |                           |                             |
//	   |   fails, is cancelled     |                             |
//	   `---------------------------+------------> ended <--------'
type phase uint8

const (
	copying phase = iota // the target is behind
	ready                // it was equal once; the two are kept in step until the job is told to end
	ending               // the work is over: errors are not up to the policies any more
	ended                // what was taken is given back
	phases
)

var phaseNames = [phases]string{"copying", "ready", "ending", "ended"}

// edges: row from, true to.
var edges = [phases][phases]bool{
	copying: {ready: true, ended: true},
	ready:   {ending: true, ended: true},
	ending:  {ended: true},
}

// state is all that decides what a job does next.
type state struct {
	phase phase
	// mode is when guests' writes are to go to both sides; both is whether they do.
	mode types.MirrorCopyMode
	both bool
	// pivot: the target is to take the source's place at the end.
	pivot bool
	// failure ends the job: what Run failed with, or a guest's write to both sides for which its
	// clients were told so.
	failure error
}

// to is the state in another phase. An edge that does not exist is a bug and panics.
func (s state) to(p phase) state {
	if !edges[s.phase][p] {
		panic(fmt.Sprintf("mirror: illegal transition %s to %s", phaseNames[s.phase], phaseNames[p]))
	}
	s.phase, s.both = p, s.both && p != ended
	return s
}

// turn decides where guests' writes go from now on: to both sides in the mode write-blocking, or if
// the job does not converge otherwise.
func (s state) turn(converge bool) state {
	s.both = s.failure == nil && s.phase != ended && (converge || s.mode == types.MirrorCopyModeWriteBlocking)
	return s
}

// fail is the state after an error that ends the job. The first one counts.
func (s state) fail(err error) state {
	if s.failure == nil {
		s.failure = err
	}
	s.both = false
	return s
}

// complete is the state of a job that was told to put the target in the source's place. A job that
// is about to leave the graph, one way or the other, is not stopped by that.
func (s state) complete() state {
	s.pivot = s.pivot || s.phase <= ready
	return s
}

// step is what a job does next.
type step uint8

const (
	copyOn  step = iota // copy what is dirty
	getEven             // become ready
	end                 // hold the source quiet and be over
	rest                // wait for something to do
)

// endAsked tells whether the job is to end with success as soon as it can. cancelled: gently.
func (s state) endAsked(cancelled bool) bool { return s.phase == ready && (s.pivot || cancelled) }

// next is what to do with so many dirty bytes, of which most may be copied with the source held
// quiet.
func (s state) next(cancelled bool, dirty, most int64) step {
	switch {
	case s.endAsked(cancelled) && dirty <= max(most, lastCopy):
		return end
	case s.phase == copying && dirty <= most:
		return getEven
	case dirty == 0:
		return rest
	}
	return copyOn
}

// life is the state of a job for all who look at it and change it. Looking is one atomic load: each
// request of a guest does.
type life struct{ now atomic.Pointer[state] }

func (l *life) get() state {
	if s := l.now.Load(); s != nil {
		return *s
	}
	return state{}
}

// both tells whether guests' writes go to both sides.
func (l *life) both() bool { s := l.now.Load(); return s != nil && s.both }

// failure is the error that ends the job, as its clients were told, or nil.
func (l *life) failure() error { return l.get().failure }

func (l *life) change(f func(state) state) {
	for {
		was := l.now.Load()
		var s state
		if was != nil {
			s = *was
		}
		if s = f(s); l.now.CompareAndSwap(was, &s) {
			return
		}
	}
}

func (l *life) to(p phase)         { l.change(func(s state) state { return s.to(p) }) }
func (l *life) turn(converge bool) { l.change(func(s state) state { return s.turn(converge) }) }
func (l *life) fail(err error)     { l.change(func(s state) state { return s.fail(err) }) }
func (l *life) complete()          { l.change(state.complete) }
func (l *life) setMode(m types.MirrorCopyMode) {
	l.change(func(s state) state { s.mode = m; return s })
}

const (
	// patience is how many passes over what is dirty a job in the background mode makes before
	// guests' writes go to both sides, until it is ready, or over. That leaves one pass, and one
	// for the writes that were under way.
	patience = 3
	// holdAfter is how many passes it makes before it holds the source quiet for the rest: then
	// somebody writes past the filter. hold is how long that takes at most, as far as it can tell;
	// it doubles, maxDoublings times at most, each time that doubleAfter passes more were in vain.
	holdAfter    = patience + 3
	hold         = 20 * time.Millisecond
	doubleAfter  = 20
	maxDoublings = 8
	// lastCopy is what may always be copied, in bytes, while the source is held quiet for the end.
	lastCopy = 4 << 20
)

// pace is how a job comes to the moment when nothing is dirty, however fast guests write.
type pace struct {
	passes int     // over what is dirty, made in vain
	rate   float64 // of the last one, in bytes per second
}

// stuck tells whether the job does not converge as long as guests' writes go to the source alone.
func (p pace) stuck() bool { return p.passes >= patience }

// most is how many bytes may be copied with the source held quiet.
func (p pace) most() int64 {
	if p.passes < holdAfter {
		return 0
	}
	t := hold << min((p.passes-holdAfter)/doubleAfter, maxDoublings)
	return int64(min(p.rate*t.Seconds(), 1<<50))
}

// passed counts a pass over so many bytes.
func (p *pace) passed(n int64, took time.Duration) {
	p.passes++
	p.rate = float64(n) / max(took.Seconds(), 1e-6)
}
