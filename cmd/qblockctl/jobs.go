package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// jobInfo is a job as query-jobs and, for block jobs, query-block-jobs tell of it.
type jobInfo struct {
	ID, Type, Status string
	Current          int64 `json:"current-progress"`
	Total            int64 `json:"total-progress"`
	Error            string

	Limit    int64  `json:"-"` // bytes per second; 0: none
	IOStatus string `json:"-"` // "ok", "" where there is none
}

// inBytes tells whether the progress counts bytes: image creation counts steps.
func (j *jobInfo) inBytes() bool { return j.Type != "create" && j.Type != "amend" }

func (j *jobInfo) fraction() float64 {
	if j.Total <= 0 {
		return 0
	}
	return min(1, float64(j.Current)/float64(j.Total))
}

func (j *jobInfo) percent() string { return fmt.Sprintf("%.0f%%", 100*j.fraction()) }

// done shows how far the job is, in what it counts.
func (j *jobInfo) done() string {
	if j.inBytes() {
		return size(j.Current) + " of " + size(j.Total)
	}
	return fmt.Sprintf("%d of %d", j.Current, j.Total)
}

// state is the status, with what else there is to say.
func (j *jobInfo) state() string {
	s := j.Status
	if j.IOStatus != "" && j.IOStatus != "ok" {
		s += ", I/O " + j.IOStatus
	}
	if j.Error != "" {
		s += ": " + printable(j.Error)
	}
	return s
}

// fetchJobs asks for all jobs.
func fetchJobs(ctx context.Context, c *client) ([]jobInfo, error) {
	jobs, err := query[[]jobInfo](ctx, c, "query-jobs", nil)
	if err != nil || len(jobs) == 0 {
		return nil, err
	}
	block, err := query[[]struct {
		Device   string
		Speed    int64
		IOStatus string `json:"io-status"`
	}](ctx, c, "query-block-jobs", nil)
	if err != nil {
		return nil, err
	}
	for i := range jobs {
		for _, b := range block {
			if b.Device == jobs[i].ID {
				jobs[i].Limit, jobs[i].IOStatus = b.Speed, b.IOStatus
			}
		}
	}
	return jobs, nil
}

func (a *app) jobsCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:                   "jobs [--watch]",
		DisableFlagsInUseLine: true,
		Short:                 "list jobs, or watch their progress",
		Long: "Lists the jobs of the daemon. With --watch it shows a bar for each, with speed, time left and state, until none has\n" +
			"anything left to do, or Ctrl-C; the exit status is 1 if one failed meanwhile. Jobs that are ready or pending wait\n" +
			"for job-complete or job-finalize: they are watched until that came.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return a.watch(cmd.Context())
			}
			c, err := dial(cmd.Context(), a.socket, nil)
			if err != nil {
				return err
			}
			defer c.close()
			jobs, err := fetchJobs(cmd.Context(), c)
			if err != nil {
				return err
			}
			return printJobs(a.out, jobs)
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show progress until no job has anything left to do")
	return cmd
}

// printJobs prints a table of the jobs.
func printJobs(out io.Writer, jobs []jobInfo) error {
	if len(jobs) == 0 {
		_, err := fmt.Fprintln(out, "no jobs")
		return err
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tTYPE\tPROGRESS\tDONE\tLIMIT\tSTATE")
	for i := range jobs {
		j := &jobs[i]
		limit := "-"
		if j.Limit > 0 {
			limit = size(j.Limit) + "/s"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", j.ID, j.Type, j.percent(), j.done(), limit, j.state())
	}
	return t.Flush()
}

// meter measures the speed of something by what it did in the last seconds.
type meter struct{ samples []sample }

type sample struct {
	at   time.Time
	done int64
}

// meterWindow is how far back a meter looks.
const meterWindow = 4 * time.Second

func (m *meter) add(at time.Time, done int64) {
	if n := len(m.samples); n > 0 && done < m.samples[n-1].done {
		m.samples = nil // it began anew
	}
	m.samples = append(m.samples, sample{at, done})
	for len(m.samples) > 2 && at.Sub(m.samples[1].at) >= meterWindow {
		m.samples = m.samples[1:]
	}
}

// perSecond is the speed; 0 when it is not known.
func (m *meter) perSecond() float64 {
	n := len(m.samples)
	if n < 2 {
		return 0
	}
	d := m.samples[n-1].at.Sub(m.samples[0].at).Seconds()
	if d < 0.1 {
		return 0
	}
	return float64(m.samples[n-1].done-m.samples[0].done) / d
}

// left is the time that the rest takes at this speed; -1 when that is not known.
func (m *meter) left(rest int64) time.Duration {
	v := m.perSecond()
	if v <= 0 {
		return -1
	}
	return time.Duration(min(float64(rest)/v, 1e6) * float64(time.Second))
}

// clock shows a time left: 1:02, 3:04:05, "-:--" when it is not known.
func clock(d time.Duration) string {
	if d < 0 {
		return "-:--"
	}
	s := int64((d + time.Second - 1) / time.Second)
	if s >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
	}
	return fmt.Sprintf("%d:%02d", s/60, s%60)
}
