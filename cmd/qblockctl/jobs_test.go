package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func event(t *testing.T, name, data string) *message {
	t.Helper()
	if !json.Valid([]byte(data)) {
		t.Fatal(data)
	}
	return &message{Event: name, Data: json.RawMessage(data)}
}

// TestTracker plays the life of four jobs: one that completes between two looks, one that fails,
// one that is cancelled, one that stays until it is dismissed.
func TestTracker(t *testing.T) {
	tr, now := newTracker(), time.Unix(0, 0)
	tr.update(now, []jobInfo{
		{ID: "a", Type: "stream", Status: "running", Current: 0, Total: 100 << 20},
		{ID: "b", Type: "stream", Status: "running"},
		{ID: "c", Type: "create", Status: "running", Total: 1},
	})
	now = now.Add(2 * time.Second)
	tr.update(now, []jobInfo{
		{ID: "a", Type: "stream", Status: "running", Current: 20 << 20, Total: 100 << 20},
		{ID: "b", Type: "stream", Status: "running"},
		{ID: "c", Type: "create", Status: "concluded", Current: 1, Total: 1},
	})
	if got, want := tr.order[0].tail(), " 20%     10 MiB/s  ETA 0:08  running"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if !tr.busy() || tr.failure() != nil {
		t.Error("over already")
	}
	tr.event(event(t, "JOB_STATUS_CHANGE", `{"id": "d", "status": "running"}`))
	tr.event(event(t, "BLOCK_JOB_CANCELLED", `{"device": "d", "type": "stream", "len": 4, "offset": 1, "speed": 0}`))
	tr.event(event(t, "JOB_STATUS_CHANGE", `{"id": "d", "status": "null"}`))
	tr.event(event(t, "BLOCK_JOB_COMPLETED", `{"device": "a", "type": "stream", "len": 100, "offset": 100, "speed": 0}`))
	tr.event(event(t, "BLOCK_JOB_COMPLETED", `{"device": "b", "type": "stream", "len": 9, "offset": 3, "speed": 0, "error": "No space"}`))
	tr.event(event(t, "SHUTDOWN", `{}`))
	tr.update(now, []jobInfo{{ID: "c", Type: "create", Status: "concluded", Current: 1, Total: 1}})
	if tr.busy() {
		t.Error("not over")
	}
	for i, want := range []string{"100%  completed", " 33%  failed: No space", "100%  concluded", " 25%  cancelled"} {
		if got := tr.order[i].tail(); got != want {
			t.Errorf("%s: %q, want %q", tr.order[i].ID, got, want)
		}
	}
	if err := tr.failure(); err == nil || err.Error() != "job 'b' failed: No space" {
		t.Error(err)
	}
	// A new job of an old name is another one.
	tr.update(now, []jobInfo{{ID: "a", Type: "stream", Status: "running"}})
	if len(tr.order) != 5 || !tr.busy() {
		t.Errorf("%d jobs", len(tr.order))
	}
}

func TestLines(t *testing.T) {
	var out bytes.Buffer
	l := &lines{out: &out, said: map[*tracked]string{}}
	tr := newTracker()
	for i := range int64(101) {
		tr.update(time.Unix(i, 0), []jobInfo{{ID: "j", Type: "stream", Status: "running", Current: i, Total: 100}})
		l.show(tr)
	}
	tr.update(time.Unix(200, 0), nil)
	l.show(tr)
	if n := strings.Count(out.String(), "\n"); n != 12 || !strings.HasSuffix(out.String(), "j stream 100% concluded\n") {
		t.Errorf("%d lines:\n%s", n, out.String())
	}
}

func TestShown(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1 MiB", 5 << 40: "5 TiB", 1<<63 - 1: "8 EiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-1: "-:--", 0: "0:00", 61 * time.Second: "1:01", 3 * time.Hour: "3:00:00"} {
		if got := clock(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	var out bytes.Buffer
	j := jobInfo{ID: "j", Type: "stream", Status: "running", Current: 1 << 20, Total: 4 << 20, Limit: 1 << 20}
	j.IOStatus = "nospace"
	if err := printJobs(&out, []jobInfo{j}); err != nil ||
		!strings.Contains(out.String(), "j   stream  25%       1 MiB of 4 MiB  1 MiB/s  running, I/O nospace\n") {
		t.Errorf("%v %s", err, out.String())
	}
	m := event(t, "X", `{"b": {"c": [1, "x y"]}, "a": "z", "e": {}}`)
	if got := (style{}).event(m); !strings.HasSuffix(got, ` X b.c.0=1 b.c.1="x y" a=z`) {
		t.Error(got)
	}
}
