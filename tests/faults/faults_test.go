package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/daemon"
	"qblockd/tests/rig"
)

// scenario is something that users do.
type scenario struct {
	name  string
	setup func(e *env) error
	act   func(e *env) error
	undo  func(e *env) error // of act, after success; nil: the graph is as before anyway
	// want changes a copy of e.old into what top shows afterwards; nil: nothing changes, or there
	// is no top.
	want func(e *env, p []byte) []byte
	// files whose I/O fails.
	files []string
	// but: these do not fail, because they may do so unseen: punching holes and cutting the file
	// are favours, and a refcount that cannot be read when its cluster has been given up makes a
	// leak.
	but drivertest.Op
	// hidden: the scenario may succeed although an I/O fails; contents are checked all the same.
	hidden bool
	// ends: the graph changes even if act fails.
	ends bool
}

func patch(off, n int, v byte) func(e *env, p []byte) []byte {
	return func(e *env, p []byte) []byte {
		copy(p[off*e.cs/8:], bytes.Repeat([]byte{v}, n*e.cs/8))
		return p
	}
}

// Offsets and lengths of patches are in eighths of clusters.
func writing(off, n int, f blk.Flags) func(e *env) error {
	return func(e *env) error { return e.write(bytes.Repeat([]byte{7}, n*e.cs/8), off*e.cs/8, f) }
}

func del(name string) func(e *env) error {
	return func(e *env) error { return e.Nodes.Del(e.ctx, name) }
}

func (e *env) stream(base *string) error {
	a := &types.BlockStreamArgs{JobID: rig.Ptr("j"), Device: "top", BaseNode: base, AutoDismiss: rig.Ptr(false)}
	if err := e.BlockJob.BlockStream(e.ctx, a); err != nil {
		return err
	}
	j := e.Jobs.Get("j")
	<-j.Finished()
	return errors.Join(j.Err(), j.Dismiss())
}

var both = []string{"top", "base"}

func scenarios() []scenario {
	closed := func(e *env) error { return e.chain() }
	return []scenario{
		{name: "open", setup: closed, act: func(e *env) error { return e.add("top", nil) }, undo: del("top"), files: both},
		{name: "open chain", setup: closed, files: both, act: func(e *env) error {
			base := e.options("base", &types.BlockdevRefOrNull{Null: true})
			return e.Nodes.Add(e.ctx, e.options("top", &types.BlockdevRefOrNull{Definition: base}))
		}, undo: func(e *env) error { return e.Nodes.Del(e.ctx, "top") }},
		{name: "open and repair", setup: (*env).dirty, act: func(e *env) error { return e.add("top", nil) }, undo: del("top"), files: []string{"top"}},
		{name: "overlay of an open node", setup: func(e *env) error {
			return errors.Join(e.chain(), e.add("base", &types.BlockdevRefOrNull{Null: true}))
		}, act: func(e *env) error {
			return e.Nodes.Add(e.ctx, e.options("top", &types.BlockdevRefOrNull{Reference: rig.Ptr("base")}))
		}, undo: del("top"), files: both},
		{name: "create", setup: func(e *env) error { return errors.Join(e.chain(), e.MakeFile("fresh", 0, nil)) }, files: []string{"fresh"},
			act: func(e *env) error {
				return e.CreateQcow2(e.ctx, "fresh", types.BlockdevCreateOptionsQcow2{Size: 1 << 20, ClusterSize: rig.Ptr(uint64(e.cs)),
					Preallocation: rig.Ptr(types.PreallocModeMetadata)})
			}},
		{name: "allocating write", setup: (*env).guest, act: writing(75, 30, 0), want: patch(75, 30, 7), files: both},
		{name: "long allocating write", setup: (*env).guest, act: writing(60, 200, 0), want: patch(60, 200, 7), files: both},
		{name: "overwrite", setup: (*env).guest, act: writing(25, 10, 0), want: patch(25, 10, 7), files: []string{"top"}},
		{name: "FUA write", setup: (*env).guest, act: writing(75, 30, blk.FUA), want: patch(75, 30, 7), files: both},
		{name: "write and flush", setup: (*env).guest, want: patch(75, 30, 7), files: both, act: func(e *env) error {
			return errors.Join(writing(75, 30, 0)(e), e.flush())
		}},
		{name: "compressed write", setup: (*env).guest, act: writing(80, 8, blk.Compressed), want: patch(80, 8, 7), files: both},
		{name: "zero", setup: (*env).guest, want: patch(20, 41, 0), files: both, but: drivertest.OpDiscard,
			act: func(e *env) error {
				zero := func(r *blk.Req) error { return e.root.Zero(r, int64(20*e.cs/8), int64(41*e.cs/8), blk.MayUnmap) }
				return errors.Join(e.unit(zero), e.flush())
			}},
		{name: "discard", setup: (*env).guest, want: patch(24, 48, 0), files: both,
			but: drivertest.OpDiscard | drivertest.OpRead, act: func(e *env) error {
				discard := func(r *blk.Req) error { return e.root.Discard(r, int64(3*e.cs), int64(6*e.cs)) }
				return errors.Join(e.unit(discard), e.flush())
			}},
		{name: "grow", setup: (*env).guest, files: both, act: func(e *env) error {
			return e.Nodes.Resize(e.ctx, nil, rig.Ptr("top"), int64(3000*e.cs), blk.PreallocOff)
		}, want: func(e *env, p []byte) []byte { return append(p, make([]byte, 3000*e.cs-len(p))...) }},
		{name: "shrink", setup: (*env).guest, files: both,
			but: drivertest.OpDiscard | drivertest.OpResize | drivertest.OpRead, act: func(e *env) error {
				return e.Nodes.Resize(e.ctx, nil, rig.Ptr("top"), int64(4*e.cs), blk.PreallocOff)
			}, want: func(e *env, p []byte) []byte { return p[:4*e.cs] }},
		{name: "stream", setup: (*env).guest, act: func(e *env) error { return e.stream(nil) }, want: same, files: both},
		{name: "stream from an intermediate", setup: (*env).three, act: func(e *env) error { return e.stream(e.node("base")) }, want: same,
			files: []string{"top", "mid", "base"}},
		{name: "export", setup: (*env).exportable, act: (*env).useExport, want: patch(75, 30, 7), files: both},
		{name: "delete", setup: func(e *env) error { return errors.Join(e.guest(), writing(75, 30, 0)(e), e.detach()) }, act: del("top"),
			files: both, ends: true, hidden: true},
	}
}

// three is base <- mid <- top with a guest.
func (e *env) three() error {
	if err := e.chain(); err != nil {
		return err
	}
	e.Store.Put("mid", e.Store.Get("top"))
	if err := e.makeImage("top", clusters+3, "mid", false); err != nil {
		return err
	}
	e.old = append(e.old, make([]byte, 3*e.cs)...)
	return errors.Join(e.add("top", nil), e.attach("top"))
}

// node is the name of the node of an image below top.
func (e *env) node(file string) *string {
	for n := e.Graph.Node("top"); n != nil; n = graph.Now.BackingChainNext(n) {
		if e.Nodes.Filename(n) == file {
			return rig.Ptr(n.Name())
		}
	}
	return rig.Ptr("none")
}

// dirty is chain with a top that was not closed, with lazy refcounts.
func (e *env) dirty() error {
	if err := errors.Join(e.chain(), e.makeImage("top", clusters, "base", true), e.add("top", nil), e.attach("top")); err != nil {
		return err
	}
	if err := errors.Join(writing(75, 30, 0)(e), e.flush(), writing(200, 9, 0)(e), e.flush()); err != nil {
		return err
	}
	left := e.Store.Get("top").Clone()
	if err := errors.Join(e.detach(), e.Nodes.Del(e.ctx, "top")); err != nil {
		return err
	}
	e.Store.Put("top", left)
	e.old = bytes.Repeat([]byte{1}, clusters*e.cs)
	patch(75, 30, 7)(e, e.old)
	patch(200, 9, 7)(e, e.old)
	return nil
}

func (e *env) exportable() error {
	return errors.Join(e.guest(), e.NBD.Start(e.ctx, &types.NbdServerOptions{Addr: types.SocketAddress{
		Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: e.socket, Abstract: rig.Ptr(true)}}}))
}

// useExport is the life of an export with a client that writes.
func (e *env) useExport() error {
	err := e.Exports.Add(e.ctx, &types.BlockExportOptions{Type: types.BlockExportTypeNbd, ID: "e", NodeName: "top",
		Writable: rig.Ptr(true), U: &types.BlockExportOptionsNbd{}})
	if err != nil {
		return err
	}
	c, err := daemon.DialNBD("@"+e.socket, "top")
	if err == nil {
		// Several requests: the first error does not end the connection.
		p := bytes.Repeat([]byte{7}, 30*e.cs/8)
		err = errors.Join(c.WriteAt(p, int64(75*e.cs/8)), c.Flush(), c.ReadAt(make([]byte, len(p)), int64(75*e.cs/8)))
		c.Close()
	}
	return errors.Join(err, e.Exports.Del(e.ctx, "e", types.BlockExportRemoveModeHard))
}

// TestEachFailure is the whole of it.
func TestEachFailure(t *testing.T) {
	for _, s := range append(scenarios(), jobScenarios()...) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			runs, leaks, hidden := 0, 0, 0
			for _, cs := range []int{512, 4096} {
				for _, file := range s.files {
					for _, after := range []bool{false, true} {
						for i := 0; ; i++ {
							f := &fault{file: file, at: i, err: syscall.EIO, after: after, ops: drivertest.OpAny &^ s.but}
							if i%2 == 1 {
								f.err = syscall.ENOSPC
							}
							struck, out, err := failOnce(&s, cs, f)
							if err != nil {
								t.Fatalf("clusters of %d, call %d of %s fails with %v, after effect %v: %v", cs, i, file, f.err, after, err)
							}
							if !struck {
								break
							}
							if out.hidden && !s.hidden {
								// It was read ahead, and again when it was needed.
								f.twice = true
								struck, out, err = failOnce(&s, cs, f)
								if err != nil || !struck || out.hidden {
									t.Fatalf("clusters of %d, calls %d and next of %s fail with %v, after effect %v: does not surface; %v", cs, i, file, f.err, after, err)
								}
								hidden++
							}
							runs++
							leaks += out.leaks
							if out.hidden {
								hidden++
							}
						}
					}
				}
			}
			t.Logf("%d failures, %d not seen, %d leaked clusters", runs, hidden, leaks)
		})
	}
}

type outcome struct {
	leaks  int
	hidden bool
}

// failOnce plays a scenario with one failure, and again without.
func failOnce(s *scenario, cs int, f *fault) (struck bool, out outcome, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	e := newEnv(ctx, cs)
	defer func() { err = errors.Join(err, e.Close()) }()
	if err := s.setup(e); err != nil {
		return false, out, fmt.Errorf("setup: %w", err)
	}
	e.new = e.old
	if s.want != nil {
		e.new = s.want(e, bytes.Clone(e.old))
	}
	before := e.dump()
	e.arm(f)
	failure := s.act(e)
	struck = e.disarm()
	// What only the count of an image's references needs fails no request: it is logged, and the
	// count is given up.
	out.hidden = struck && failure == nil && !e.Log.Said("What the image refers to cannot be looked at")
	switch {
	case !struck && failure != nil:
		return struck, out, fmt.Errorf("fails without a failure: %w", failure)
	case failure != nil && !s.ends && e.dump() != before:
		return struck, out, fmt.Errorf("%w; the graph was\n%s\nand is\n%s", failure, before, e.dump())
	}
	if e.root != nil {
		if err := e.contents(failure == nil && s.want != nil && !s.hidden); err != nil {
			return struck, out, fmt.Errorf("%w; afterwards: %w", failure, err)
		}
	}
	if failure != nil && !s.ends {
		if err := s.act(e); err != nil {
			return struck, out, fmt.Errorf("%w; and again: %w", failure, err)
		}
	}
	if e.root != nil {
		if err := e.contents(true); err != nil {
			return struck, out, fmt.Errorf("%w; after doing it again: %w", failure, err)
		}
	}
	if s.undo != nil {
		if err := s.undo(e); err != nil {
			return struck, out, fmt.Errorf("undo: %w", err)
		}
	}
	out.leaks, err = e.end()
	return struck, out, err
}

// end takes the graph apart and looks at the images.
func (e *env) end() (leaks int, err error) {
	if err := e.detach(); err != nil {
		return 0, err
	}
	for _, name := range []string{"copy", "top", "base"} {
		if n := e.Graph.Node(name); n != nil && n.MonitorOwned() {
			if err := e.Nodes.Del(e.ctx, name); err != nil {
				return 0, err
			}
		}
	}
	if err := e.Left(); err != nil {
		return 0, err
	}
	for _, name := range e.Store.Names() {
		res, err := e.Check(e.ctx, name)
		if err != nil {
			return leaks, fmt.Errorf("%s: %w", name, err)
		}
		if res.Corruptions+res.Errors > 0 {
			return leaks, fmt.Errorf("%s: %+v", name, *res)
		}
		leaks += res.Leaks
	}
	return leaks, nil
}
