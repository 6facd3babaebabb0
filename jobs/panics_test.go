package jobs

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"qblockd/events/panics"
	"qblockd/schema/types"
)

// buggyWork panics in the call of that name.
type buggyWork struct {
	work
	at string
}

func (w *buggyWork) call(name string) {
	w.note(name)
	if w.at == name {
		panic("bug in " + name)
	}
}
func (w *buggyWork) Run(context.Context, *Handle) error     { w.call("run"); return nil }
func (w *buggyWork) Prepare(context.Context, *Handle) error { w.call("prepare"); return nil }
func (w *buggyWork) Commit(*Handle)                         { w.call("commit") }
func (w *buggyWork) Abort(*Handle)                          { w.call("abort") }
func (w *buggyWork) Clean(*Handle)                          { w.call("clean") }

// A job whose runner panics ends as one that has failed, with what clients are to hear and
// everything given back; other jobs do not notice.
func TestRunnerPanics(t *testing.T) {
	defer panics.Contain()()
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for at, want := range map[string]string{
		"run":     "run abort clean",
		"prepare": "run prepare abort clean",
		"commit":  "run prepare commit clean",
		"clean":   "run prepare commit clean",
	} {
		r := newRecorder()
		m := NewManager(r, nil)
		w := &buggyWork{at: at}
		j, err := m.Create(Spec{ID: "j", Type: types.JobTypeStream, Block: true, Runner: w, ManualDismiss: true})
		if err != nil {
			t.Fatal(err)
		}
		m.Start(j)()
		<-j.Finished()
		log := r.wait("j:concluded")
		if w.said() != want {
			t.Errorf("%s: %s, want %s", at, w.said(), want)
		}
		fails := at == "run" || at == "prepare"
		if told := strings.Contains(log, "COMPLETED(Internal error in stream job 'j'"); told != fails || (j.Err() != nil) != fails {
			t.Errorf("%s: %v, %s", at, j.Err(), log)
		}
		if err := j.Dismiss(); err != nil {
			t.Error(err)
		}
		k := start(t, m, Spec{ID: "k", Type: types.JobTypeStream, Block: true, Runner: &work{}})
		<-k.Finished()
		if err := m.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
