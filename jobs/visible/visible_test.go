package visible

import (
	"fmt"
	"math"
	"testing"

	"qblockd/jobs/machine"
)

// TestPauses: each moment has its row.
func TestPauses(t *testing.T) {
	got := ""
	for m := range moments {
		got += fmt.Sprint(map[bool]string{true: "all ", false: "near "}[m.All()], m.Pairs(), "\n")
	}
	const want = "all 1\nnear 1\n" + // transactions
		"near 1\nnear 1\nnear 1\nnear 2\nnear 2\n" + // nodes
		"near 1\nnear 1\nnear 2\nnear 2\nnear 3\n" + // stream
		"near 1\nnear 1\nall 1\n"
	if got != want {
		t.Errorf("%s, want\n%s", got, want)
	}
}

// TestAnswers: only mirrors are answered first, and only when they are asked to end or to go on.
func TestAnswers(t *testing.T) {
	for _, j := range []Job{Mirror, ActiveCommit, Backup, "commit", "stream", "create", "amend"} {
		got := ""
		for v := machine.Cancel; v <= machine.Alter; v++ {
			if AnswerFirst(j, v) {
				got += v.String() + " "
			}
		}
		want := ""
		if j == Mirror || j == ActiveCommit {
			want = "cancel resume complete "
		}
		if got != want {
			t.Errorf("%s: answered first: %s, want %s", j, got, want)
		}
	}
}

// TestStarts is who gets how far before the command that starts a job is answered.
func TestStarts(t *testing.T) {
	for _, d := range []Disks{
		{true, 0, false}, {true, 16 << 20, false}, {true, 16<<20 + 1, false}, {true, math.MaxInt64, false},
		{false, 0, false}, {false, 1 << 40, true},
	} {
		mirror := d.AtOnce && d.Size <= 16<<20 || d.Nothing
		want := map[Job]bool{Backup: d.AtOnce, Mirror: mirror, ActiveCommit: mirror}
		for _, j := range []Job{Mirror, ActiveCommit, Backup, "commit", "stream", "create", "amend"} {
			if got := StartFirst(j, d); got != want[j] {
				t.Errorf("%s on %+v: %v", j, d, got)
			}
		}
	}
}

// TestShownPaused: only a mirror whose work is over.
func TestShownPaused(t *testing.T) {
	for s := machine.Created; s <= machine.Null; s++ {
		want := s == machine.Waiting || s == machine.Pending
		for _, j := range []Job{Mirror, ActiveCommit, Backup, "commit", "stream"} {
			if got := ShownPaused(j, s); got != (want && (j == Mirror || j == ActiveCommit)) {
				t.Errorf("%s in state %s is shown as paused: %v", j, s, got)
			}
		}
	}
}
