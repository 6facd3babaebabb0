package faults

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/qmp/handlers"
	"qblockd/schema/types"
	"qblockd/schema/value"
	"qblockd/tests/rig"
)

// What users put above, below and beside the nodes of a job while it is at work must not keep the
// job from leaving the graph, however it ends.

var every = flag.Int("leaving", 61, "try one of so many ways for a job to leave")

// console executes commands as they are written on the wire.
type console struct {
	*rig.Rig
	ctx      context.Context
	handlers map[string]types.HandlerFunc
	guests   []*graph.Root
}

// Handle implements types.Registrar.
func (c *console) Handle(name string, f types.HandlerFunc) { c.handlers[name] = f }

func newConsole(ctx context.Context) *console {
	c := &console{Rig: rig.New(""), ctx: ctx, handlers: map[string]types.HandlerFunc{}}
	types.RegisterBlockCore(c, handlers.BlockCore{Nodes: c.Nodes, Jobs: c.Jobs})
	types.RegisterBlockJob(c, c.BlockJob)
	types.RegisterJob(c, handlers.Job{Jobs: c.Jobs})
	types.RegisterTransaction(c, c.Transaction)
	return c
}

// say executes lines of the form "command arguments"; "guest node" and "reader node" put a user on
// a node.
func (c *console) say(lines ...string) error {
	for _, l := range lines {
		name, args, _ := strings.Cut(l, " ")
		if name == "guest" || name == "reader" {
			n := c.Graph.Node(args)
			if n == nil {
				return fmt.Errorf("%s: no such node", l)
			}
			r, err := c.AttachRoot(c.ctx, n, name == "reader")
			if err != nil {
				return err
			}
			c.guests = append(c.guests, r)
			continue
		}
		v, err := value.Parse("{" + args + "}")
		if err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
		if _, err := c.handlers[name](c.ctx, v.(*value.Dict), nil); err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
	}
	return nil
}

// chain makes the nodes a <- b <- c <- d, and s, t and u beside them.
func (c *console) chain() error {
	below := ""
	for _, n := range []string{"a", "b", "c", "d", "s", "t", "u"} {
		if err := c.MakeFile(n, 0, nil); err != nil {
			return err
		}
		if err := c.CreateQcow2(c.ctx, n, types.BlockdevCreateOptionsQcow2{Size: leavingSize}); err != nil {
			return err
		}
		backing := "null"
		if n <= "d" && below != "" {
			backing = "'" + below + "'"
		}
		below = n
		if err := c.say(fmt.Sprintf("blockdev-add 'driver': 'qcow2', 'node-name': '%s', 'file': {'driver': 'file', 'filename': '%s'}, 'backing': %s", n, n, backing)); err != nil {
			return err
		}
		if n < "t" {
			if err := c.fill(n); err != nil {
				return err
			}
		}
	}
	return nil
}

const leavingSize = 2 << 20

// fill writes here and there to a node, each in places of its own, so that a job with a speed limit
// has to wait in between.
func (c *console) fill(n string) error {
	root, err := c.AttachRoot(c.ctx, c.Graph.Node(n), false)
	if err != nil {
		return err
	}
	r, err := root.Begin(c.ctx)
	if err == nil {
		p := bytes.Repeat([]byte(n), 4096)
		for off := int64(n[0]-'a') * (64 << 10) % (512 << 10); off < leavingSize && err == nil; off += 512 << 10 {
			err = root.WriteAt(r, blk.Buf(p), off, 0)
		}
		root.End(r)
	}
	return errors.Join(err, c.Graph.CloseRoot(c.ctx, root))
}

// leavers are the jobs, all with the filter f but where they have none, each in a phase in which it
// stays until it is told to end.
var leavers = []struct {
	name, phase string
	lines       []string
}{
	{"stream", "running", []string{"block-stream 'job-id': 'j', 'device': 'c', 'base-node': 'a', 'filter-node-name': 'f', 'speed': 1"}},
	{"stream", "pending", []string{"block-stream 'job-id': 'j', 'device': 'c', 'base-node': 'a', 'filter-node-name': 'f', 'auto-finalize': false"}},
	{"commit", "running", []string{"block-commit 'job-id': 'j', 'device': 'd', 'top-node': 'c', 'base-node': 'a', 'filter-node-name': 'f', 'speed': 1"}},
	{"commit", "pending", []string{"block-commit 'job-id': 'j', 'device': 'd', 'top-node': 'c', 'base-node': 'a', 'filter-node-name': 'f', 'auto-finalize': false"}},
	{"active commit", "running", []string{"block-commit 'job-id': 'j', 'device': 'd', 'base-node': 'b', 'filter-node-name': 'f', 'speed': 1"}},
	{"active commit", "ready", []string{"block-commit 'job-id': 'j', 'device': 'd', 'base-node': 'b', 'filter-node-name': 'f'"}},
	{"mirror", "running", []string{"blockdev-mirror 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'full', 'filter-node-name': 'f', 'speed': 1"}},
	{"mirror", "ready", []string{"blockdev-mirror 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'full', 'filter-node-name': 'f'"}},
	{"mirror", "ready", []string{"blockdev-mirror 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'top', 'filter-node-name': 'f', 'copy-mode': 'write-blocking', 'auto-finalize': false"}},
	{"backup", "running", []string{"blockdev-backup 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'full', 'filter-node-name': 'f', 'speed': 1"}},
	{"backup", "running", []string{"blockdev-backup 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'none', 'filter-node-name': 'f'"}},
	{"backup", "pending", []string{"blockdev-backup 'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'full', 'filter-node-name': 'f', 'auto-finalize': false"}},
	{"backup", "waiting", []string{"transaction 'actions': [" +
		"{'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'd', 'target': 't', 'sync': 'full', 'filter-node-name': 'f'}}, " +
		"{'type': 'blockdev-backup', 'data': {'job-id': 'k', 'device': 's', 'target': 'u', 'sync': 'none'}}], 'properties': {'completion-mode': 'grouped'}"}},
}

// intruders are what is done then; a command that is refused ends its line. N and M are each of the
// nodes.
var intruders = [][]string{
	{"guest N"},
	{"reader N"},
	{"blockdev-add 'driver': 'raw', 'node-name': 'x', 'file': 'N'", "guest x"},
	{"blockdev-add 'driver': 'raw', 'node-name': 'x', 'file': 'N', 'read-only': true", "reader x"},
	{"blockdev-add 'driver': 'copy-on-read', 'node-name': 'x', 'file': 'N'", "guest x"},
	{"blockdev-add 'driver': 'compress', 'node-name': 'x', 'file': 'N'", "guest x"},
	{"blockdev-add 'driver': 'snapshot-access', 'node-name': 'x', 'file': 'N'", "reader x"},
	{"blockdev-add 'driver': 'copy-before-write', 'node-name': 'x', 'file': 'N', 'target': 'M'"},
	{"blockdev-add 'driver': 'copy-before-write', 'node-name': 'x', 'file': 'N', 'target': 'M'", "guest x"},
	{"blockdev-add 'driver': 'copy-before-write', 'node-name': 'x', 'file': 'N', 'target': 'M'", "reader x"},
	{"blockdev-add 'driver': 'blkverify', 'node-name': 'x', 'test': 'N', 'raw': 'M'", "guest x"},
	{"blockdev-snapshot 'node': 'N', 'overlay': 's'"},
	{"blockdev-snapshot 'node': 'N', 'overlay': 's'", "guest s"},
	{"blockdev-mirror 'job-id': 'k', 'device': 'N', 'target': 'M', 'sync': 'full', 'speed': 1"},
	{"blockdev-backup 'job-id': 'k', 'device': 'N', 'target': 'M', 'sync': 'none'"},
	{"blockdev-backup 'job-id': 'k', 'device': 'N', 'target': 'M', 'sync': 'none', 'filter-node-name': 'x'", "blockdev-snapshot 'node': 'x', 'overlay': 's'"},
	{"block-stream 'job-id': 'k', 'device': 'N', 'speed': 1"},
	{"block-stream 'job-id': 'k', 'device': 'N', 'base-node': 'M', 'speed': 1"},
	{"block-commit 'job-id': 'k', 'device': 'N', 'speed': 1"},
	{"block-commit 'job-id': 'k', 'device': 'N', 'base-node': 'M', 'speed': 1"},
	{"blockdev-reopen 'options': [{'driver': 'qcow2', 'node-name': 'N', 'file': {'driver': 'file', 'filename': 'N'}, 'read-only': true}]"},
	{"blockdev-reopen 'options': [{'driver': 'qcow2', 'node-name': 'N', 'file': {'driver': 'file', 'filename': 'N'}, 'backing': null}]"},
	{"blockdev-reopen 'options': [{'driver': 'qcow2', 'node-name': 'N', 'file': {'driver': 'file', 'filename': 'N'}, 'backing': 'M'}]"},
	{"blockdev-add 'driver': 'raw', 'node-name': 'x', 'file': 's'", "blockdev-reopen 'options': [{'driver': 'raw', 'node-name': 'x', 'file': 'N'}]", "guest x"},
	{"blockdev-add 'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'filename': 'x'}, 'backing': 'N'", "guest x"},
	{"block-dirty-bitmap-add 'node': 'N', 'name': 'b'"},
	{"change-backing-file 'device': 'N', 'image-node-name': 'M', 'backing-file': 'a'"},
}

var ends = []string{"job-cancel 'id': 'j'", "block-job-cancel 'device': 'j'", "block-job-cancel 'device': 'j', 'force': true", "job-complete 'id': 'j'", "job-finalize 'id': 'j'"}

func TestJobsLeave(t *testing.T) {
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	nodes := []string{"f", "a", "b", "c", "d", "t"}
	tried, stayed, at := 0, 0, 0
	for _, j := range leavers {
		for _, lines := range intruders {
			for _, n := range nodes {
				for _, m := range nodes {
					if all := strings.Join(lines, "\n"); m != nodes[0] && !strings.Contains(all, "'M'") || m == n && strings.Contains(all, "'M'") {
						continue
					}
					for _, end := range ends {
						if end == ends[3] && j.phase != "ready" || end == ends[4] && j.phase != "pending" {
							continue
						}
						if at++; at%*every != 0 {
							continue
						}
						tried++
						left, err := leave(t.Context(), j.lines, j.phase, filled(lines, n, m), end)
						if err != nil {
							t.Errorf("%s, %s, %q, %s: %v", j.name, j.phase, filled(lines, n, m), end, err)
						}
						if left {
							stayed++
						}
					}
				}
			}
		}
	}
	t.Logf("%d ways to leave, a filter stayed for its users in %d", tried, stayed)
}

func filled(lines []string, n, m string) []string {
	l := make([]string, len(lines))
	for i, s := range lines {
		s = strings.NewReplacer("'N'", "'"+n+"'", "'M'", "'"+m+"'").Replace(s)
		l[i] = strings.TrimSuffix(s, " N")
		if l[i] != s {
			l[i] += " " + n
		}
	}
	return l
}

// leave starts a job, lets the intruders do what they may, ends the job and takes everything down.
// It tells whether the job's filter stayed for those who use it.
func leave(ctx context.Context, start []string, phase string, intruders []string, end string) (stayed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c := newConsole(ctx)
	defer func() {
		if e := c.Close(); err == nil && e != nil {
			err = fmt.Errorf("closing: %w", e)
		}
	}()
	if err := c.chain(); err != nil {
		return false, err
	}
	if err := c.MakeFile("x", 0, nil); err != nil {
		return false, err
	}
	if err := c.CreateQcow2(ctx, "x", types.BlockdevCreateOptionsQcow2{Size: leavingSize}); err != nil {
		return false, err
	}
	if err := c.say(start...); err != nil {
		return false, fmt.Errorf("start: %w", err)
	}
	if err := c.await(phase); err != nil {
		return false, err
	}
	_ = c.say(intruders...) // as far as they may
	_ = c.say(end)
	if err := c.over("j"); err != nil {
		return false, err
	}
	f := c.Graph.Node("f")
	stayed = f != nil
	if stayed {
		if len(f.Parents()) == 0 {
			return true, fmt.Errorf("the filter is there without a user")
		}
		for _, e := range f.Parents() {
			if strings.Contains(e.Parent().Describe(), "'j'") {
				return true, fmt.Errorf("the job still uses its filter")
			}
		}
	}
	return stayed, c.takeDown()
}

// await waits until job j is in the phase.
func (c *console) await(phase string) error {
	for t := time.NewTicker(50 * time.Microsecond); ; {
		for _, q := range c.Jobs.Query() {
			if q.ID == "j" && string(q.Status) == phase {
				t.Stop()
				return nil
			}
		}
		select {
		case <-t.C:
		case <-c.ctx.Done():
			return fmt.Errorf("job j does not become %s: %+v", phase, c.Sink.Events())
		}
	}
}

// over waits for the end of a job, and cancels it if it does not end by what it was told.
func (c *console) over(id string) error {
	j := c.Jobs.Get(id)
	if j == nil {
		return nil
	}
	if ended := func() bool {
		for t, n := time.NewTicker(50*time.Microsecond), 0; n < 40; n++ {
			select {
			case <-j.Finished():
				t.Stop()
				return true
			case <-t.C:
			}
		}
		return false
	}(); !ended {
		_ = c.say("block-job-cancel 'device': '" + id + "', 'force': true")
	}
	select {
	case <-j.Finished():
		return nil
	case <-c.ctx.Done():
		return fmt.Errorf("job %s does not end", id)
	}
}

// takeDown removes all users, jobs and nodes; nothing may be left then.
func (c *console) takeDown() error {
	for _, r := range c.guests {
		if err := c.Graph.CloseRoot(c.ctx, r); err != nil {
			return err
		}
	}
	for _, q := range c.Jobs.Query() {
		if err := c.over(q.ID); err != nil {
			return err
		}
	}
	for progress := true; progress; {
		progress = false
		for _, n := range c.Graph.Topology().Nodes {
			if n.MonitorOwned() && c.Nodes.Del(c.ctx, n.Name()) == nil {
				progress = true
			}
		}
	}
	return c.Left()
}
