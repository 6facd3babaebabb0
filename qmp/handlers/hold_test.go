package handlers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/blockdev/export/nbd"
	"qblockd/events"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// world is all handlers on one graph.
type world struct {
	commands
	t     *testing.T
	g     *graph.Graph
	jobs  *jobs.Manager
	nodes *blockdev.Manager
}

func newWorld(t *testing.T) *world { return newWorldSink(t, &drivertest.Sink{}) }

// newWorldSink is newWorld with a sink for the events of jobs.
func newWorldSink(t *testing.T, s events.Sink) *world {
	g := drivertest.NewGraph(t)
	w := &world{commands: commands{}, t: t, g: g, jobs: jobs.NewManager(s, nil)}
	w.nodes = blockdev.New(g, blockdev.Config{Drivers: drivers.All})
	exports := export.New(g, export.Options{})
	server := nbd.NewType(exports, nbd.Options{})
	job := BlockJob{Graph: g, Jobs: w.jobs, Nodes: w.nodes}
	types.RegisterBlockCore(w, BlockCore{Nodes: w.nodes, Jobs: w.jobs, Exports: exports})
	types.RegisterTransaction(w, Transaction{Nodes: w.nodes, Jobs: job})
	types.RegisterBlockJob(w, job)
	types.RegisterJob(w, Job{Jobs: w.jobs})
	types.RegisterBlockExport(w, BlockExport{Graph: g, Exports: exports, NBD: server})
	t.Cleanup(func() {
		exports.Close(context.Background())
		_ = w.jobs.Shutdown(context.Background())
	})
	return w
}

func (w *world) ok(name, args string) {
	w.t.Helper()
	if got := w.say(w.t, name, args); strings.HasPrefix(got, "GenericError") {
		w.t.Fatalf("%s %s: %s", name, args, got)
	}
}

// image makes a file an empty qcow2 image of 1 MiB.
func (w *world) image(file string) {
	w.t.Helper()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	protocol := types.BlockdevOptions{Driver: types.BlockdevDriverFile, U: &types.BlockdevOptionsFile{Filename: file}}
	format := types.BlockdevCreateOptionsQcow2{Size: 1 << 20, File: types.BlockdevRef{Definition: &protocol}}
	create := w.nodes.Creator(&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: &format})
	if err := create(context.Background(), func() {}); err != nil {
		w.t.Fatal(err)
	}
}

// try executes a command and returns its error.
func (w *world) try(ctx context.Context, name, args string) error {
	v, err := value.Parse(args)
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = w.commands[name](ctx, v.(*value.Dict), nil)
	return err
}

// held is a world with a chain of two images in dir, base and over, which has a snapshot and a
// bitmap, and with nodes besides.
func held(t *testing.T, dir string) *world {
	w := newWorld(t)
	w.ok("nbd-server-start", fmt.Sprintf(`{'addr': {'type': 'unix', 'data': {'path': '%s/s'}}}`, dir))
	for _, n := range []string{"base", "t", "over"} {
		file := filepath.Join(dir, n)
		w.image(file)
		backing := "null"
		if n == "over" {
			backing = "'base'"
		}
		w.ok("blockdev-add", fmt.Sprintf(`{'driver': 'qcow2', 'node-name': '%s', 'backing': %s, 'file': {'driver': 'file', 'node-name': '%s-file', 'filename': '%s'}}`, n, backing, n, file))
	}
	w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'idle', 'size': 1048576}`)
	w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'copy', 'size': 1048576}`)
	w.ok("block-dirty-bitmap-add", `{'node': 'over', 'name': 'b'}`)
	w.ok("block-dirty-bitmap-add", `{'node': 'idle', 'name': 'b'}`)
	w.ok("blockdev-snapshot-internal-sync", `{'device': 'over', 'name': 's'}`)
	return w
}

type command struct{ name, args string }

// commandsOnOver are those that look at the metadata of the node over, or change them.
func commandsOnOver(dir string) []command {
	file := filepath.Join(dir, "new")
	return []command{
		{"block_resize", `{'node-name': 'over', 'size': 2097152}`},
		{"blockdev-del", `{'node-name': 'over'}`},
		{"blockdev-reopen", `{'options': [{'driver': 'qcow2', 'node-name': 'over', 'file': 'over-file', 'backing': 'base', 'cache-size': 1048576}]}`},
		{"blockdev-reopen", `{'options': [{'driver': 'file', 'node-name': 'over-file', 'filename': '` + filepath.Join(dir, "over") + `'}]}`},
		{"block-set-write-threshold", `{'node-name': 'over', 'write-threshold': 1}`},
		{"x-blockdev-set-iothread", `{'node-name': 'over', 'iothread': null}`},
		{"block-dirty-bitmap-add", `{'node': 'over', 'name': 'c'}`},
		{"block-dirty-bitmap-add", `{'node': 'over', 'name': 'c', 'persistent': true}`},
		{"block-dirty-bitmap-remove", `{'node': 'over', 'name': 'b'}`},
		{"block-dirty-bitmap-clear", `{'node': 'over', 'name': 'b'}`},
		{"block-dirty-bitmap-enable", `{'node': 'over', 'name': 'b'}`},
		{"block-dirty-bitmap-disable", `{'node': 'over', 'name': 'b'}`},
		{"block-dirty-bitmap-merge", `{'node': 'over', 'target': 'b', 'bitmaps': [{'node': 'idle', 'name': 'b'}]}`},
		{"block-dirty-bitmap-merge", `{'node': 'idle', 'target': 'b', 'bitmaps': [{'node': 'over', 'name': 'b'}]}`},
		{"x-debug-block-dirty-bitmap-sha256", `{'node': 'over', 'name': 'b'}`},
		{"blockdev-snapshot-internal-sync", `{'device': 'over', 'name': 't'}`},
		{"blockdev-snapshot-delete-internal-sync", `{'device': 'over', 'name': 's'}`},
		{"blockdev-snapshot-sync", `{'node-name': 'over', 'snapshot-node-name': 'new', 'snapshot-file': '` + file + `'}`},
		{"blockdev-snapshot", `{'node': 'over', 'overlay': 't'}`},
		{"blockdev-snapshot", `{'node': 't', 'overlay': 'over'}`},
		{"transaction", `{'actions': [{'type': 'block-dirty-bitmap-clear', 'data': {'node': 'idle', 'name': 'b'}}, {'type': 'block-dirty-bitmap-clear', 'data': {'node': 'over', 'name': 'b'}}]}`},
		{"blockdev-backup", `{'device': 'over', 'target': 'copy', 'sync': 'full', 'job-id': 'j'}`},
		{"blockdev-backup", `{'device': 'idle', 'target': 'over', 'sync': 'full', 'job-id': 'j'}`},
		{"drive-backup", `{'device': 'over', 'target': '` + file + `', 'format': 'raw', 'sync': 'full', 'job-id': 'j'}`},
		{"blockdev-mirror", `{'device': 'over', 'target': 'copy', 'sync': 'full', 'job-id': 'j'}`},
		{"blockdev-mirror", `{'device': 'idle', 'target': 'over', 'sync': 'full', 'job-id': 'j'}`},
		{"drive-mirror", `{'device': 'over', 'target': '` + file + `', 'format': 'raw', 'sync': 'full', 'job-id': 'j'}`},
		{"block-stream", `{'device': 'over', 'job-id': 'j'}`},
		{"block-commit", `{'device': 'over', 'job-id': 'j'}`},
		{"change-backing-file", `{'device': 'over', 'image-node-name': 'over', 'backing-file': 'x'}`},
		{"block-export-add", `{'type': 'nbd', 'id': 'e', 'node-name': 'over'}`},
		{"block-export-add", `{'type': 'nbd', 'id': 'e', 'node-name': 'idle', 'bitmaps': [{'node': 'over', 'name': 'b'}]}`},
		{"nbd-server-add", `{'device': 'over'}`},
	}
}

// Every command that looks at the metadata of a node, or changes them, waits for who holds the
// node, as long as its client does; then it has changed nothing. Those that only show or steer do
// not wait.
func TestCommandsWaitForHeldNodes(t *testing.T) {
	dir := t.TempDir()
	w := held(t, dir)
	hold, err := w.g.HoldNodes(context.Background(), w.g.Node("over"))
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("the client has gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	waiting := commandsOnOver(dir)
	see := func() string {
		return w.say(t, "query-named-block-nodes", `{}`) + w.say(t, "x-debug-query-block-graph", `{}`) + w.say(t, "query-block-exports", `{}`)
	}
	before := see()
	for _, c := range waiting {
		if err := w.try(ctx, c.name, c.args); err != gone {
			t.Errorf("%s %s of a node that is held: %v", c.name, c.args, err)
		}
	}
	if after := see(); after != before {
		t.Errorf("it was\n%s\nand is\n%s", before, after)
	}
	// What does not name the node does not wait.
	for _, c := range []command{
		{"query-jobs", `{}`}, {"query-block-jobs", `{}`}, {"query-blockstats", `{'query-nodes': true}`},
		{"block-dirty-bitmap-clear", `{'node': 'idle', 'name': 'b'}`}, {"block-dirty-bitmap-add", `{'node': 'base', 'name': 'b'}`},
		{"blockdev-backup", `{'device': 'idle', 'target': 'copy', 'sync': 'none', 'job-id': 'j'}`},
		{"job-pause", `{'id': 'j'}`}, {"job-cancel", `{'id': 'j'}`},
		{"blockdev-add", `{'driver': 'raw', 'node-name': 'r', 'file': 'base'}`}, {"blockdev-del", `{'node-name': 'r'}`},
	} {
		if err := w.try(context.Background(), c.name, c.args); err != nil {
			t.Errorf("%s %s: %v", c.name, c.args, err)
		}
	}
	hold.Release()
	for _, c := range waiting {
		if err := w.try(ctx, c.name, c.args); err == gone && c.name != "drive-backup" && c.name != "drive-mirror" && c.name != "blockdev-snapshot-sync" {
			t.Errorf("%s %s of a node that nobody holds: %v", c.name, c.args, err)
		}
	}
}

// The end of a job waits for who holds its nodes. A cancel of a job that is about to end does not,
// but for a moment.
func TestJobsEndWaitsForHeldNodes(t *testing.T) {
	w := newWorld(t)
	for _, n := range []string{"n", "t"} {
		w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': '`+n+`', 'size': 1048576}`)
	}
	w.ok("blockdev-backup", `{'device': 'n', 'target': 't', 'sync': 'full', 'job-id': 'j', 'auto-finalize': false}`)
	j := w.jobs.Get("j")
	hold, err := w.g.HoldNodes(context.Background(), w.g.Node("n"))
	if err != nil {
		t.Fatal(err)
	}
	w.ok("job-cancel", `{'id': 'j'}`)
	select {
	case <-j.Finished():
		t.Error("a job ends although somebody holds its source")
	default:
	}
	hold.Release()
	<-j.Finished()
}

// Of two backups that start at the same time with one bitmap one is refused.
func TestOneBackupOfABitmap(t *testing.T) {
	w := newWorld(t)
	for _, n := range []string{"n", "t0", "t1"} {
		w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': '`+n+`', 'size': 1048576}`)
	}
	w.ok("block-dirty-bitmap-add", `{'node': 'n', 'name': 'x'}`)
	for range 300 {
		w.g.Node("n").Bitmaps().Find("x").Bits().Set(0, 1)
		var wg sync.WaitGroup
		var errs [2]error
		for i := range errs {
			wg.Go(func() {
				errs[i] = w.try(context.Background(), "blockdev-backup",
					fmt.Sprintf(`{'device': 'n', 'target': 't%d', 'sync': 'incremental', 'bitmap': 'x', 'job-id': 'j%d'}`, i, i))
			})
		}
		wg.Wait()
		if errs[0] != nil && errs[1] != nil {
			t.Fatal(errs)
		}
		for i := range errs {
			if j := w.jobs.Get(fmt.Sprint("j", i)); j != nil {
				<-j.Finished()
			}
		}
		if d := w.g.Node("n").Bitmaps().Find("x"); d.Busy() {
			t.Fatal("the bitmap is in use after both jobs have ended")
		}
	}
}

// A transaction that is undone takes back what it did itself, not what another client was told is
// done, and is not seen to have less meanwhile.
func TestUndoBesideOthers(t *testing.T) {
	w := newWorld(t)
	w.ok("blockdev-add", `{'driver': 'null-co', 'node-name': 'n', 'size': 1048576}`)
	for _, b := range []string{"x", "y", "z"} {
		w.ok("block-dirty-bitmap-add", `{'node': 'n', 'name': '`+b+`', 'disabled': true, 'granularity': 65536}`)
	}
	n := w.g.Node("n")
	n.Bitmaps().Find("y").Bits().Set(0, 1)
	n.Bitmaps().Find("z").Bits().Set(1<<19, 1)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, step := range []string{
				`{'type': 'block-dirty-bitmap-merge', 'data': {'node': 'n', 'target': 'x', 'bitmaps': ['y']}}`,
				`{'type': 'block-dirty-bitmap-clear', 'data': {'node': 'n', 'name': 'x'}}`,
				`{'type': 'block-dirty-bitmap-merge', 'data': {'node': 'n', 'target': 'x', 'bitmaps': ['z']}}`,
			} {
				if err := w.try(context.Background(), "transaction", `{'actions': [`+step+`, {'type': 'abort', 'data': {}}]}`); err == nil {
					t.Error("a transaction that aborts succeeds")
				}
			}
		}
	}()
	for range 1000 {
		for _, c := range []struct {
			name, args string
			want       int64
		}{
			{"block-dirty-bitmap-clear", `{'node': 'n', 'name': 'x'}`, 0},
			{"block-dirty-bitmap-merge", `{'node': 'n', 'target': 'x', 'bitmaps': ['z']}`, 65536},
		} {
			if err := w.try(context.Background(), c.name, c.args); err != nil {
				t.Fatal(err)
			}
			// A step of the other client may be under way: what it did is gone when nobody holds
			// the node.
			hold, err := w.g.HoldNodes(context.Background(), n)
			if err != nil {
				t.Fatal(err)
			}
			if got := n.Bitmaps().Find("x").Bits().Count(); got != c.want {
				t.Fatalf("after %s: %d bytes are dirty, want %d", c.name, got, c.want)
			}
			hold.Release()
		}
	}
	close(stop)
	<-done
}
