// Package rig is the inside of the daemon without its wire: graph, nodes, jobs and exports in this
// process, on files in memory or in a directory, with a clock that the test drives. Random, fault
// and crash tests stand on it.
package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/blockdev/export/nbd"
	"qblockd/blockdev/format/qcow2"
	"qblockd/events/clock"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/jobs"
	"qblockd/qmp/handlers"
	"qblockd/schema/types"
)

// Rig is one daemon's worth of parts. Its fields may be used directly.
type Rig struct {
	Graph       *graph.Graph
	Sink        *drivertest.Sink
	Nodes       *blockdev.Manager
	Jobs        *jobs.Manager
	BlockJob    handlers.BlockJob
	Transaction handlers.Transaction
	Exports     *export.Table
	NBD         *nbd.Type
	Clock       *clock.Manual
	Store       *Store // nil with files in a directory
	Dir         string // "": files are in Store
	Log         *Log
}

// Log keeps what the parts have logged.
type Log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// Said tells whether a record has that text.
func (l *Log) Said(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.text.Bytes(), []byte(text))
}

// New makes a rig whose "file" nodes open files of a new Store, or, unless dir is empty, in that
// directory.
func New(dir string) *Rig {
	x := &Rig{Sink: &drivertest.Sink{}, Clock: clock.NewManual(time.Unix(1_000_000_000, 0)), Dir: dir, Log: &Log{}}
	log := slog.New(slog.NewTextHandler(x.Log, nil))
	x.Graph = graph.New(x.Sink)
	c := blockdev.Config{Log: log, Drivers: drivers.All}
	if dir == "" {
		x.Store = NewStore()
		c.Drivers = x.Store.Drivers()
	}
	x.Nodes = blockdev.New(x.Graph, c)
	x.Jobs = jobs.NewManager(x.Sink, x.Clock)
	x.BlockJob = handlers.BlockJob{Graph: x.Graph, Jobs: x.Jobs, Nodes: x.Nodes}
	x.Transaction = handlers.Transaction{Nodes: x.Nodes, Jobs: x.BlockJob}
	x.Exports = export.New(x.Graph, export.Options{Log: log})
	x.NBD = nbd.NewType(x.Exports, nbd.Options{Log: log})
	return x
}

// Close ends everything and tells what does not end within a minute.
func (x *Rig) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	x.Exports.Close(ctx)
	return errors.Join(x.Jobs.Shutdown(ctx), x.Graph.Close(ctx))
}

// Left names what is still there of nodes, roots, jobs, exports and open files: nothing, once
// everything was taken back.
func (x *Rig) Left() error {
	t := x.Graph.Topology()
	var errs []error
	for _, n := range t.Nodes {
		errs = append(errs, fmt.Errorf("node %s is left", n.Name()))
	}
	for _, r := range t.Roots {
		errs = append(errs, fmt.Errorf("a root on node %s is left: %s", r.Node().Name(), r.Describe()))
	}
	for _, j := range x.Jobs.Query() {
		errs = append(errs, fmt.Errorf("job %s is left", j.ID))
	}
	for _, e := range x.Exports.Query() {
		errs = append(errs, fmt.Errorf("export %s is left", e.ID))
	}
	if x.Store != nil {
		errs = append(errs, x.Store.left()...)
	}
	return errors.Join(errs...)
}

// Path is what "filename" says for the file called name.
func (x *Rig) Path(name string) string {
	if x.Dir == "" {
		return name
	}
	return filepath.Join(x.Dir, name)
}

// MakeFile makes a file of size zero bytes, in place of one that was there.
func (x *Rig) MakeFile(name string, size int64, o *drivertest.MemOptions) error {
	if x.Dir == "" {
		if o == nil {
			x.Store.Put(name, drivertest.NewMemFile(size))
		} else {
			x.Store.Put(name, drivertest.NewMemFileOptions(size, *o))
		}
		return nil
	}
	f, err := os.Create(x.Path(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// RemoveFile removes a file that nobody has open.
func (x *Rig) RemoveFile(name string) error {
	if x.Dir == "" {
		x.Store.Remove(name)
		return nil
	}
	return os.Remove(x.Path(name))
}

// Save writes the file called name to path, holes as holes.
func (x *Rig) Save(name, path string) error {
	if x.Dir == "" {
		return SaveMem(x.Store.Get(name), path)
	}
	b, err := os.ReadFile(x.Path(name))
	if err != nil {
		return err
	}
	return writeSparse(path, b)
}

// SaveMem writes the content of m to path, holes as holes.
func SaveMem(m *drivertest.MemFile, path string) error { return writeSparse(path, m.Bytes()) }

func writeSparse(path string, b []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const step = 64 << 10
	for off := 0; off < len(b) && err == nil; off += step {
		if p := b[off:min(off+step, len(b))]; !blk.IsZero(p) {
			_, err = f.WriteAt(p, int64(off))
		}
	}
	return errors.Join(err, f.Truncate(int64(len(b))), f.Close())
}

// Ptr is a pointer to v.
func Ptr[T any](v T) *T { return &v }

// File is the definition of an unnamed node on the file called name.
func (x *Rig) File(name string) types.BlockdevRef {
	return types.BlockdevRef{Definition: &types.BlockdevOptions{
		Driver: types.BlockdevDriverFile, U: &types.BlockdevOptionsFile{Filename: x.Path(name)}}}
}

// CreateQcow2 makes an image in the file called name, which is there already; o.File is filled in.
func (x *Rig) CreateQcow2(ctx context.Context, name string, o types.BlockdevCreateOptionsQcow2) error {
	o.File = x.File(name)
	return x.Nodes.Creator(&types.BlockdevCreateOptions{Driver: types.BlockdevDriverQcow2, U: &o})(ctx, func() {})
}

// AttachRoot attaches a root that reads, and writes unless readOnly, and shares everything.
func (x *Rig) AttachRoot(ctx context.Context, n *graph.Node, readOnly bool) (*graph.Root, error) {
	claim := drivertest.Writer
	if readOnly {
		claim = drivertest.Reader
	}
	return x.attach(ctx, n, claim)
}

func (x *Rig) attach(ctx context.Context, n *graph.Node, c perm.Claim) (*graph.Root, error) {
	tx := x.Graph.Begin(ctx)
	defer tx.Abort()
	r, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: c, Kind: graph.KindBackend}, n)
	if err != nil {
		return nil, err
	}
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	return r, nil
}

// Check opens the qcow2 image in the file called name for reading, alone, and looks it over.
func (x *Rig) Check(ctx context.Context, name string) (*qcow2.CheckResult, error) {
	o := &types.BlockdevOptions{
		Driver: types.BlockdevDriverQcow2, NodeName: Ptr("check-" + name), ReadOnly: Ptr(true),
		U: &types.BlockdevOptionsQcow2{File: x.File(name), Backing: &types.BlockdevRefOrNull{Null: true}},
	}
	if err := x.Nodes.Add(ctx, o); err != nil {
		return nil, err
	}
	n := x.Graph.Node(*o.NodeName)
	res, err := CheckNode(ctx, n)
	return res, errors.Join(err, x.Nodes.Del(ctx, *o.NodeName))
}

// CheckNode looks the open qcow2 image of n over.
func CheckNode(ctx context.Context, n *graph.Node) (*qcow2.CheckResult, error) {
	return n.Driver().(*qcow2.Driver).Check(&blk.Req{Ctx: ctx})
}
