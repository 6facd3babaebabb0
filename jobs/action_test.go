package jobs

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"qblockd/events"
	"qblockd/graph"
)

// step is an action that writes down what is done with it.
type step struct {
	name          string
	log           *[]string
	open, prepare error
}

var _ Opener = step{}

func (s step) say(what string)                          { *s.log = append(*s.log, what+" "+s.name) }
func (s step) Nodes() []*graph.Node                     { return nil }
func (s step) Commit()                                  { s.say("commit") }
func (s step) Abort()                                   { s.say("abort") }
func (s step) Clean()                                   { s.say("clean") }
func (s step) Prepare(context.Context, *graph.Tx) error { s.say("prepare"); return s.prepare }
func (s step) Open(context.Context, *graph.Tx) error {
	s.say("open")
	return s.open
}

func TestRunActions(t *testing.T) {
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
		err := RunActions(context.Background(), graph.New(events.NewBus(events.Options{})), l...)
		if (err != nil) != (c.fail != "") || strings.Join(log, ", ") != c.want {
			t.Errorf("failing %q: %v\n%s, want\n%s", c.fail, err, strings.Join(log, ", "), c.want)
		}
	}
}
