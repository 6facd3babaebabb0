package panics

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// records are those of the log.
type records chan string

// Write implements io.Writer.
func (r records) Write(p []byte) (int, error) {
	r <- string(p)
	return len(p), nil
}

// until is what was logged up to a record with that text, which it waits for.
func (r records) until(text string) (log string) {
	for !strings.Contains(log, text) {
		log += <-r
	}
	return log
}

// logged takes the log for the time of the test.
func logged(t *testing.T) records {
	r := make(records, 100)
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(r, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return r
}

func TestContained(t *testing.T) {
	b := logged(t)
	defer Contain()()
	got := make(chan error, 1)
	Go("a goroutine", func() { panic("oh") }, func(err error) { got <- err })
	err := <-got
	var p *Error
	if !errors.As(err, &p) || p.Value != "oh" || !errors.Is(err, syscall.EIO) ||
		err.Error() != "Internal error in a goroutine: this is a bug of the daemon, and its log tells more" {
		t.Errorf("%v", err)
	}
	f := func() (n int, err error) {
		defer Into("a function", &err)
		var l []int
		return l[3], nil
	}
	if _, err := f(); !errors.As(err, &p) {
		t.Errorf("%v", err)
	}
	var g Group
	g.Go("a member", func() { panic("no") })
	g.Wait()
	AfterFunc("a timer", time.Nanosecond, func() { panic("late") })
	if log := b.until("panic=late"); !strings.Contains(log, "panic=oh") || !strings.Contains(log, "index out of range") || !strings.Contains(log, "panics_test.go") {
		t.Errorf("log: %s", log)
	}
}

func TestAwait(t *testing.T) {
	logged(t)
	defer Contain()()
	done, stuck := false, make(chan struct{})
	defer close(stuck)
	if err := Await(t.Context(), "a look", func() { done = true }); err != nil || !done {
		t.Errorf("%v, done: %v", err, done)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Await(ctx, "a look", func() { <-stuck }); err != context.Canceled {
		t.Errorf("not over: %v", err)
	}
	var p *Error
	if err := Await(t.Context(), "a look", func() { panic("oh") }); !errors.As(err, &p) || p.What != "a look" {
		t.Errorf("after a panic: %v", err)
	}
}

func TestFatal(t *testing.T) {
	b := logged(t)
	defer Contain()()
	code := 0
	exit = func(c int) { code = c }
	defer func(f func(int)) { exit = f }(exit)
	func() {
		defer Catch("a command", func(error) { t.Error("it was caught") })
		var mu sync.Mutex
		mu.Lock()
		defer Fatal("the state of everything")
		panic("oh")
	}()
	b.until("the daemon ends")
	if code != 2 {
		t.Errorf("exit code %d", code)
	}
}

// Where nobody has asked for it a panic is one.
func TestNotContained(t *testing.T) {
	defer func() {
		if recover() != "oh" {
			t.Error("the panic is gone")
		}
	}()
	var err error
	defer Fatal("all")
	defer Catch("a goroutine", nil)
	defer Into("a function", &err)
	panic("oh")
}
