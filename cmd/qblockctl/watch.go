package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// watchInterval is how often the daemon is asked how far its jobs are.
const watchInterval = 200 * time.Millisecond

// tracked is a job that is watched.
type tracked struct {
	jobInfo
	meter   meter
	over    bool
	outcome string // once over: "completed", "cancelled", "failed: ...", "concluded"
	failed  bool
}

// tracker follows jobs by what queries and events say.
type tracker struct {
	jobs  map[string]*tracked
	order []*tracked // as they came; ended ones stay
}

func newTracker() *tracker { return &tracker{jobs: map[string]*tracked{}} }

// job returns the live job of that id; a new one if there is none.
func (t *tracker) job(id string) *tracked {
	j := t.jobs[id]
	if j == nil {
		j = &tracked{jobInfo: jobInfo{ID: id}}
		t.jobs[id] = j
		t.order = append(t.order, j)
	}
	return j
}

// update takes what query-jobs said. A job that is not there any more is over; how it ended was in
// its events.
func (t *tracker) update(now time.Time, jobs []jobInfo) {
	seen := map[string]bool{}
	for _, info := range jobs {
		seen[info.ID] = true
		j := t.job(info.ID)
		j.jobInfo = info
		j.meter.add(now, info.Current)
		if info.Status == "concluded" {
			t.end(j)
		}
	}
	for id, j := range t.jobs {
		if !seen[id] {
			t.end(j)
			delete(t.jobs, id)
		}
	}
}

// end marks a job as over.
func (t *tracker) end(j *tracked) {
	if j.over {
		return
	}
	j.over = true
	switch {
	case j.outcome != "":
	case j.Error != "":
		j.outcome, j.failed = "failed: "+printable(j.Error), j.Error != "Operation canceled"
	default:
		j.outcome = "concluded"
	}
}

// event takes an event; those that are not about jobs change nothing.
func (t *tracker) event(m *message) {
	var data struct {
		ID, Status, Device, Type, Error string
		Len, Offset                     int64
	}
	if json.Unmarshal(m.Data, &data) != nil {
		return
	}
	switch m.Event {
	case "JOB_STATUS_CHANGE":
		if data.Status == "null" {
			if j := t.jobs[data.ID]; j != nil {
				t.end(j)
				delete(t.jobs, data.ID)
			}
			return
		}
		t.job(data.ID).Status = data.Status
	case "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED":
		j := t.job(data.Device)
		j.Type, j.Current, j.Total = data.Type, data.Offset, data.Len
		switch {
		case m.Event == "BLOCK_JOB_CANCELLED":
			j.outcome = "cancelled"
		case data.Error != "":
			j.outcome, j.failed = "failed: "+printable(data.Error), true
		default:
			j.outcome = "completed"
		}
	}
}

// busy tells whether a job has something left to do.
func (t *tracker) busy() bool {
	return slices.ContainsFunc(t.order, func(j *tracked) bool { return !j.over })
}

// failure is an error that names the jobs that failed; nil if none did.
func (t *tracker) failure() error {
	var ids []string
	for _, j := range t.order {
		if j.failed {
			ids = append(ids, "'"+j.ID+"' "+j.outcome)
		}
	}
	if ids == nil {
		return nil
	}
	return errors.New("job " + strings.Join(ids, ", "))
}

// tail is what stands behind the bar of a job.
func (j *tracked) tail() string {
	if j.over {
		return fmt.Sprintf("%4s  %s", j.percent(), j.outcome)
	}
	speed, eta := "", ""
	if j.inBytes() {
		speed = size(int64(j.meter.perSecond())) + "/s"
	}
	if j.Status == "running" || j.Status == "" {
		eta = "ETA " + clock(j.meter.left(j.Total-j.Current))
	}
	return fmt.Sprintf("%4s %12s  %-9s %s", j.percent(), speed, eta, j.state())
}

// board shows tracked jobs; show is called after each change, end at the end.
type board interface {
	show(t *tracker)
	end()
}

// watch shows the jobs' progress until none has anything left to do.
func (a *app) watch(ctx context.Context) error {
	q := newEventQueue()
	c, err := dial(ctx, a.socket, q.put)
	if err != nil {
		return err
	}
	defer c.close()
	var b board = &lines{out: a.out, said: map[*tracked]string{}}
	if isTerminal(a.out) {
		b = newBars(a.out)
	}
	defer b.end()
	t := newTracker()
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		jobs, err := fetchJobs(ctx, c)
		for _, m := range q.take() {
			t.event(m)
		}
		switch {
		case errors.Is(err, context.Canceled):
			return nil
		case err != nil:
			return err
		}
		t.update(time.Now(), jobs)
		b.show(t)
		if !t.busy() {
			if len(t.order) == 0 {
				_, err = fmt.Fprintln(a.out, "no jobs")
				return err
			}
			return t.failure()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// lines says what changes, a line each, where there is no terminal: each state, and each tenth of
// the way.
type lines struct {
	out  io.Writer
	said map[*tracked]string
}

func (l *lines) show(t *tracker) {
	for _, j := range t.order {
		state, tenth := j.state(), int(10*j.fraction())
		if j.over {
			state = j.outcome
		}
		if key := fmt.Sprint(state, tenth); l.said[j] != key {
			l.said[j] = key
			fmt.Fprintf(l.out, "%s %s %s %s\n", j.ID, j.Type, j.percent(), state)
		}
	}
}

func (l *lines) end() {}

// bars draws a bar for each job on a terminal.
type bars struct {
	p    *mpb.Progress
	bars map[*tracked]*bar
}

// bar is what the drawing goroutine reads of a job.
type bar struct {
	*mpb.Bar
	mu         sync.Mutex
	head, tail string // guarded by mu
	done       bool   // used by show only
}

func (b *bar) text(of *string) func(decor.Statistics) string {
	return func(decor.Statistics) string {
		b.mu.Lock()
		defer b.mu.Unlock()
		return *of
	}
}

func newBars(out io.Writer) *bars {
	p := mpb.New(mpb.WithOutput(out), mpb.WithWidth(64), mpb.WithRefreshRate(watchInterval/2))
	return &bars{p, map[*tracked]*bar{}}
}

func (s *bars) show(t *tracker) {
	for _, j := range t.order {
		b := s.bars[j]
		if b == nil {
			b = &bar{}
			s.bars[j] = b
			b.set(j)
			b.Bar = s.p.New(0, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding("-").Rbound("]"),
				mpb.PrependDecorators(decor.Any(b.text(&b.head))), mpb.AppendDecorators(decor.Any(b.text(&b.tail))))
		}
		if b.done {
			continue
		}
		b.set(j)
		b.SetTotal(max(j.Total, 1), false)
		b.SetCurrent(min(j.Current, max(j.Total, 1)))
		switch {
		case j.over && (j.failed || j.outcome == "cancelled"):
			b.Abort(false)
			b.done = true
		case j.over:
			b.SetTotal(max(j.Total, 1), true)
			b.done = true
		}
	}
}

func (b *bar) set(j *tracked) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.head, b.tail = fmt.Sprintf("%-14s ", j.ID+" "+j.Type), " "+j.tail()
}

// end draws the last state and gives the terminal back.
func (s *bars) end() {
	for _, b := range s.bars {
		if !b.done {
			b.Abort(false)
		}
	}
	s.p.Wait()
}
