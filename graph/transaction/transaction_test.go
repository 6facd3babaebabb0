package transaction

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"qblockd/events"
	"qblockd/events/panics"
	"qblockd/graph"
)

// step is an action that writes down what is done with it.
type step struct {
	name          string
	log           *[]string
	open, prepare error
	bug           string // what ends in a panic
}

var _ Opener = step{}

func (s step) say(what string) {
	if *s.log = append(*s.log, what+" "+s.name); what == s.bug {
		panic("bug in " + what)
	}
}
func (s step) Nodes() []*graph.Node                     { return nil }
func (s step) Commit()                                  { s.say("commit") }
func (s step) Abort()                                   { s.say("abort") }
func (s step) Clean()                                   { s.say("clean") }
func (s step) Prepare(context.Context, *graph.Tx) error { s.say("prepare"); return s.prepare }
func (s step) Open(context.Context, *graph.Tx) error {
	s.say("open")
	return s.open
}

func TestRun(t *testing.T) {
	bad := errors.New("bad")
	for _, c := range []struct {
		fail string // "", "open 1", "prepare 0"
		want string
	}{
		{"", "open 0, open 1, open 2, prepare 0, prepare 1, prepare 2, commit 0, commit 1, commit 2, clean 0, clean 1, clean 2"},
		{"open 1", "open 0, open 1, prepare 0, abort 0, clean 0, clean 1, clean 2"},
		{"prepare 0", "open 0, open 1, open 2, prepare 0, abort 0, clean 0, clean 1, clean 2"},
		{"prepare 2", "open 0, open 1, open 2, prepare 0, prepare 1, prepare 2, abort 2, abort 1, abort 0, clean 0, clean 1, clean 2"},
	} {
		var log []string
		var l []Action
		for i := range 3 {
			s := step{name: fmt.Sprint(i), log: &log}
			switch c.fail {
			case fmt.Sprint("open ", i):
				s.open = bad
			case fmt.Sprint("prepare ", i):
				s.prepare = bad
			}
			l = append(l, s)
		}
		err := Run(context.Background(), graph.New(events.NewBus(events.Options{})), l...)
		if (err != nil) != (c.fail != "") || strings.Join(log, ", ") != c.want {
			t.Errorf("failing %q: %v\n%s, want\n%s", c.fail, err, strings.Join(log, ", "), c.want)
		}
	}
}

// TestActionPanics: a panic in an action undoes the others, or lets them come to their end.
func TestActionPanics(t *testing.T) {
	defer panics.Contain()()
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		bug   string
		fails bool
		want  string
	}{
		{"open", true, "open 0, open 1, prepare 0, abort 0, clean 0, clean 1, clean 2"},
		{"prepare", true, "open 0, open 1, open 2, prepare 0, prepare 1, abort 1, abort 0, clean 0, clean 1, clean 2"},
		{"commit", false, "open 0, open 1, open 2, prepare 0, prepare 1, prepare 2, commit 0, commit 1, commit 2, clean 0, clean 1, clean 2"},
		{"abort", true, "open 0, open 1, open 2, prepare 0, prepare 1, prepare 2, abort 2, abort 1, abort 0, clean 0, clean 1, clean 2"},
		{"clean", false, "open 0, open 1, open 2, prepare 0, prepare 1, prepare 2, commit 0, commit 1, commit 2, clean 0, clean 1, clean 2"},
	} {
		var log []string
		l := []Action{step{name: "0", log: &log}, step{name: "1", log: &log, bug: c.bug}, step{name: "2", log: &log}}
		if c.bug == "abort" {
			l[2] = step{name: "2", log: &log, prepare: errors.New("bad")}
		}
		err := Run(t.Context(), graph.New(events.NewBus(events.Options{})), l...)
		if (err != nil) != c.fails || strings.Join(log, ", ") != c.want {
			t.Errorf("a bug in %s: %v\n%s, want\n%s", c.bug, err, strings.Join(log, ", "), c.want)
		}
	}
}
