// Package panics keeps a bug of ours in its place. All goroutines of the daemon are started with
// Go, or begin with a deferred Catch: a panic is logged with its stack, fails what the goroutine
// was doing, and leaves the rest of the daemon serving.
//
//	what the goroutine does      what is failed
//
//	a command                    gets an error reply; its transaction of the graph is undone
//	a job                        fails: aborted, cleaned up and concluded, with its events
//	a request in a driver        EIO, and the node takes no more requests (graph.Node.Fail)
//	a connection                 is dropped
//	work in the background       is given up
//
// Only a program that says so by Contain works like this: the daemon. Elsewhere (tests, a daemon
// built with -tags invariants) a panic ends the program, as it does with any in Go. Fatal errors of
// the runtime (memory, stack, concurrent map writes, unlocking what is not locked) end it in any
// case.
//
// There are few places where the state of the whole daemon is in doubt after a panic: where a
// planned transaction is installed in the graph, where gates are closed and opened, and in the
// steps of the jobs' state machine. These defer Fatal, and a panic there ends the daemon: what was
// acknowledged by a flush is on stable storage.
package panics

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var contained atomic.Bool

// Contain makes panics be contained from now on. restore takes that back, for tests.
func Contain() (restore func()) {
	was := contained.Swap(true)
	return func() { contained.Store(was) }
}

// Contained tells whether panics are contained.
func Contained() bool { return contained.Load() }

// Error is what a contained panic makes of what was being done; it is an EIO.
type Error struct {
	// What was being done.
	What string
	// Value is that of the panic.
	Value any
}

func (e *Error) Error() string {
	return "Internal error in " + e.What + ": this is a bug of the daemon, and its log tells more"
}

// Unwrap gives the errno.
func (e *Error) Unwrap() error { return syscall.EIO }

// Go runs f in a goroutine. After a panic failed, if it is not nil, is told so, in the same
// goroutine.
func Go(what string, f func(), failed func(error)) {
	go func() {
		defer Catch(what, failed)
		f()
	}()
}

// Group is a sync.WaitGroup whose goroutines are contained.
type Group struct{ sync.WaitGroup }

// Go is the function Go for a goroutine that Wait waits for.
func (g *Group) Go(what string, f func()) {
	g.WaitGroup.Go(func() {
		defer Catch(what, nil)
		f()
	})
}

// Await calls f in a goroutine and waits for it no longer than ctx, whose end is the error then: f
// goes on, and what it writes is not to be looked at. Other errors: f has panicked.
func Await(ctx context.Context, what string, f func()) error {
	done := make(chan error, 1)
	Go(what, func() { f(); done <- nil }, func(err error) { done <- err })
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// AfterFunc is time.AfterFunc with a function that is contained.
func AfterFunc(what string, d time.Duration, f func()) *time.Timer {
	return time.AfterFunc(d, func() {
		defer Catch(what, nil)
		f()
	})
}

// Catch is to be deferred: it ends a panic, if those are contained, and tells failed, if that is
// not nil.
func Catch(what string, failed func(error)) {
	if !contained.Load() {
		return
	}
	if p := recover(); p != nil {
		if err := Report(what, p); failed != nil {
			failed(err)
		}
	}
}

// Into is to be deferred by what returns an error: it makes one of a panic, if those are contained.
func Into(what string, err *error) {
	if !contained.Load() {
		return
	}
	if p := recover(); p != nil {
		*err = Report(what, p)
	}
}

// Report logs a panic that was recovered from, with its stack, and makes an error of it.
func Report(what string, value any) error {
	slog.Error("internal error, contained", "in", what, "panic", fmt.Sprint(value), "stack", string(debug.Stack()))
	return &Error{what, value}
}

// Fatal is to be deferred where the state of all is in doubt after a panic: it ends the program,
// whoever could catch it.
func Fatal(what string) {
	if !contained.Load() {
		return
	}
	if p := recover(); p != nil {
		slog.Error("internal error, the daemon ends", "in", what, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		exit(2)
	}
}

var exit = os.Exit
