package panics

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// logged makes the log a string for the time of the test.
func logged(t *testing.T) *strings.Builder {
	var b strings.Builder
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&b, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return &b
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
	rung := make(chan struct{})
	AfterFunc("a timer", time.Nanosecond, func() { defer close(rung); panic("late") })
	<-rung
	if log := b.String(); !strings.Contains(log, "panic=oh") || !strings.Contains(log, "index out of range") || !strings.Contains(log, "panics_test.go") {
		t.Errorf("log: %s", log)
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
	if code != 2 || !strings.Contains(b.String(), "the daemon ends") {
		t.Errorf("exit code %d, log %s", code, b.String())
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
