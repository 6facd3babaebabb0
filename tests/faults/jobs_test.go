package faults

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// ended waits for the end of job j, which gets ready, and then is to be completed or left alone.
func (e *env) ended(pivot bool) error {
	j := e.Jobs.Get("j")
	for t := time.NewTicker(200 * time.Microsecond); ; {
		select {
		case <-j.Finished():
			t.Stop()
			return errors.Join(j.Err(), j.Dismiss())
		case <-t.C:
		case <-e.ctx.Done():
			t.Stop()
			return e.ctx.Err()
		}
		for _, q := range e.Jobs.Query() {
			switch {
			case q.ID != "j" || q.Status != types.JobStatusReady:
			case pivot:
				_ = j.Complete(e.ctx)
			default:
				_ = j.Cancel(false)
			}
		}
	}
}

// withCopy is guest with an empty image besides.
func (e *env) withCopy() error {
	return errors.Join(e.guest(), e.makeImage("copy", clusters, "", false), e.add("copy", nil))
}

// sameCopy compares the copy with what the guest sees.
func (e *env) sameCopy() error {
	root, err := e.AttachRoot(e.ctx, e.Graph.Node("copy"), true)
	if err != nil {
		return err
	}
	p := make([]byte, len(e.old))
	r, err := root.Begin(e.ctx)
	if err == nil {
		err = root.ReadAt(r, blk.Buf(p), 0, 0)
		root.End(r)
	}
	if err == nil && !bytes.Equal(p, e.old) {
		err = errors.New("the copy differs")
	}
	return errors.Join(err, e.Graph.CloseRoot(e.ctx, root))
}

func (e *env) backup(sync types.MirrorSyncMode, bitmap *string) error {
	err := e.BlockJob.BlockdevBackup(e.ctx, &types.BlockdevBackup{
		JobID: rig.Ptr("j"), Device: "top", Target: "copy", Sync: sync, Bitmap: bitmap, AutoDismiss: rig.Ptr(false)})
	if err != nil {
		return err
	}
	return e.ended(false)
}

func (e *env) mirror(mode types.MirrorCopyMode, pivot bool) error {
	err := e.BlockJob.BlockdevMirror(e.ctx, &types.BlockdevMirrorArgs{
		JobID: rig.Ptr("j"), Device: "top", Target: "copy", Sync: types.MirrorSyncModeFull, CopyMode: &mode, AutoDismiss: rig.Ptr(false)})
	if err != nil {
		return err
	}
	return e.ended(pivot)
}

func (e *env) commit(top, base *string, pivot bool) error {
	err := e.BlockJob.BlockCommit(e.ctx, &types.BlockCommitArgs{
		JobID: rig.Ptr("j"), Device: "top", TopNode: top, BaseNode: base, AutoDismiss: rig.Ptr(false)})
	if err != nil {
		return err
	}
	return e.ended(pivot)
}

func (e *env) act(a ...transaction.Action) error { return transaction.Run(e.ctx, e.Graph, a...) }

func (e *env) addBitmap(name string) transaction.Action {
	return e.Nodes.BitmapAdd(&types.BlockDirtyBitmapAdd{Node: "top", Name: name, Persistent: rig.Ptr(true)})
}

// withBitmap is guest with a persistent bitmap.
func (e *env) withBitmap() error { return errors.Join(e.guest(), e.act(e.addBitmap("b"))) }

// bitmaps checks that a bitmap is there, or not.
func (e *env) bitmaps(name string, there bool) error {
	if d := e.Graph.Node("top").Bitmaps().Find(name); (d != nil) != there || d != nil && d.Inconsistent() {
		return fmt.Errorf("bitmap %s: %+v", name, d)
	}
	return nil
}

// unseen are I/Os whose failure need not be seen: holes and cuts are favours, and where data are is
// asked to save work.
const unseen = drivertest.OpDiscard | drivertest.OpResize

func jobScenarios() []scenario {
	return slices.Concat(copyScenarios(), bitmapScenarios(), nodeScenarios())
}

// written leaves an image that a guest has written to, with a bitmap.
func written(e *env) error { return errors.Join(e.withBitmap(), writing(75, 30, 0)(e), e.detach()) }

// same is what a disk shows that is to be as it was.
func same(_ *env, p []byte) []byte { return p }

// copyScenarios are jobs.
func copyScenarios() []scenario {
	files := []string{"top", "base", "copy"}
	delCopy := func(e *env) error { return e.Nodes.Del(e.ctx, "copy") }
	return []scenario{
		{name: "backup", setup: (*env).withCopy, files: files, but: unseen, hidden: true, want: same, undo: delCopy,
			act: func(e *env) error {
				return errors.Join(e.backup(types.MirrorSyncModeFull, nil), e.sameCopy())
			}},
		{name: "mirror", setup: (*env).withCopy, files: files, but: unseen, hidden: true, want: same, undo: delCopy,
			act: func(e *env) error {
				return errors.Join(e.mirror(types.MirrorCopyModeBackground, false), e.sameCopy())
			}},
		{name: "mirror and pivot", setup: (*env).withCopy, files: files, but: unseen, hidden: true, want: same, act: func(e *env) error {
			return e.mirror(types.MirrorCopyModeWriteBlocking, true)
		}},
		{name: "commit", setup: (*env).three, files: []string{"top", "mid", "base"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			return e.commit(e.node("mid"), e.node("base"), false)
		}},
		{name: "active commit", setup: (*env).guest, files: []string{"top", "base"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			return e.commit(nil, e.node("base"), false)
		}},
		{name: "incremental backup", setup: func(e *env) error {
			return errors.Join(e.withCopy(), e.backup(types.MirrorSyncModeFull, nil), e.act(e.addBitmap("b")),
				writing(75, 30, 0)(e))
		}, files: files, but: unseen, hidden: true, undo: delCopy, want: patch(75, 30, 7), act: func(e *env) error {
			patch(75, 30, 7)(e, e.old)
			return errors.Join(e.backup(types.MirrorSyncModeIncremental, rig.Ptr("b")), e.sameCopy())
		}},
	}
}

func bitmapScenarios() []scenario {
	return []scenario{
		{name: "add a bitmap", setup: (*env).guest, files: []string{"top"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			if err := e.act(e.addBitmap("b")); err != nil {
				return errors.Join(err, e.bitmaps("b", false))
			}
			return e.bitmaps("b", true)
		}},
		{name: "enable and merge", setup: (*env).withBitmap, files: []string{"top"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			b := &types.BlockDirtyBitmap{Node: "top", Name: "b"}
			return errors.Join(e.act(e.Nodes.BitmapEnable(b, false)), e.act(e.Nodes.BitmapEnable(b, true)), e.bitmaps("b", true))
		}},
		{name: "write under a bitmap", setup: (*env).withBitmap, files: []string{"top"}, want: patch(75, 30, 7), act: func(e *env) error {
			if err := errors.Join(writing(75, 30, 0)(e), e.flush()); err != nil {
				return err
			}
			if !e.Graph.Node("top").Bitmaps().Find("b").Bits().Get(int64(75 * e.cs / 8)) {
				return errors.New("not recorded")
			}
			return nil
		}},
		{name: "grow under a bitmap", setup: (*env).withBitmap, files: []string{"top"}, hidden: true, but: unseen, act: func(e *env) error {
			return e.Nodes.Resize(e.ctx, nil, rig.Ptr("top"), int64(3000*e.cs), blk.PreallocOff)
		}, want: func(e *env, p []byte) []byte { return append(p, make([]byte, 3000*e.cs-len(p))...) }},
		{name: "close with a bitmap", setup: written, act: del("top"), files: []string{"top"}, ends: true, hidden: true},
	}
}

// nodeScenarios change a node, or what is in its image beside data.
func nodeScenarios() []scenario {
	reopen := func(e *env) *types.BlockdevOptions {
		o := e.options("top", &types.BlockdevRefOrNull{Reference: e.node("base")})
		q := o.U.(*types.BlockdevOptionsQcow2)
		q.File = types.BlockdevRef{Reference: rig.Ptr(e.Graph.Node("top").File().Node().Name())}
		q.L2CacheEntrySize, o.DetectZeroes = nil, rig.Ptr(types.BlockdevDetectZeroesOptionsOn)
		return o
	}
	return []scenario{
		{name: "internal snapshot", setup: (*env).guest, files: []string{"top"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			return e.act(e.Nodes.InternalSnapshot(&types.BlockdevSnapshotInternal{Device: "top", Name: "s"}))
		}},
		{name: "transaction", setup: (*env).guest, files: []string{"top"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			// A snapshot, then a bitmap: what comes last takes what came first with it.
			err := e.act(e.Nodes.InternalSnapshot(&types.BlockdevSnapshotInternal{Device: "top", Name: "s"}), e.addBitmap("b"))
			if err == nil {
				return e.bitmaps("b", true)
			}
			if l := e.Graph.Node("top").Driver().(graph.InternalSnapshotter).Snapshots(); len(l) > 0 {
				return errors.Join(err, errors.New("the snapshot is left"))
			}
			return errors.Join(err, e.bitmaps("b", false))
		}},
		{name: "reopen", setup: (*env).withBitmap, files: []string{"top"}, but: unseen, hidden: true, want: same, act: func(e *env) error {
			return e.Nodes.Reopen([]*types.BlockdevOptions{reopen(e)}).Run(e.ctx)
		}},
		{name: "reopen for reading and for writing", setup: written,
			files: []string{"top"}, but: unseen, hidden: true, ends: true, act: func(e *env) error {
				ro, rw := reopen(e), reopen(e)
				ro.ReadOnly, rw.ReadOnly = rig.Ptr(true), rig.Ptr(false)
				for _, o := range []*types.BlockdevOptions{ro, rw} {
					was := e.Graph.Node("top").ReadOnly()
					if err := e.Nodes.Reopen([]*types.BlockdevOptions{o}).Run(e.ctx); err != nil {
						if e.Graph.Node("top").ReadOnly() != was {
							return errors.Join(err, errors.New("half of it was done"))
						}
						return err
					}
				}
				return e.bitmaps("b", true)
			}},
	}
}
