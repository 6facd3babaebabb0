package mirror

import (
	"context"
	"log/slog"
	"syscall"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
)

// The end of a job that succeeds: with the source held quiet, what is dirty is copied, the target
// flushed, and the target put in the source's place. A job that waits to be finalized does not hold
// its guests up meanwhile: it catches up once more in Prepare.

// tryEnd holds the source quiet and makes the target equal to it. It tells whether that is so; else
// there was too much to copy, or an error to be tried again, and the source goes on.
func (j *Job) tryEnd(ctx context.Context, h *jobs.Handle, most int64) (ended bool, _ error) {
	// Before guests have to wait: a command that has the nodes may take its time.
	hold, err := j.holdNodes(ctx)
	defer func() { hold.Release() }()
	var undrain func()
	if err == nil {
		undrain, err = j.quieten(ctx, h, most)
	}
	if err == nil && undrain != nil {
		if err = j.writes.Edge().Flush(&blk.Req{Ctx: ctx}); err == nil {
			if !types.Or(j.args.AutoFinalize, true) {
				undrain()
			} else {
				j.undrain, j.held, hold = undrain, hold, nil
			}
			return true, nil
		}
		undrain()
		err = &graph.CopyError{Write: true, Err: err}
	}
	hold.Release() // the policy may be to wait for users, who may need the nodes to put it right
	return false, j.failed(h, err)
}

// holdNodes takes the nodes for the end of the job.
func (j *Job) holdNodes(ctx context.Context) (*graph.Hold, error) {
	nodes := append(j.between(), j.source, j.target)
	j.mu.Lock()
	if j.replace != nil {
		nodes = append(nodes, j.replace)
	}
	j.mu.Unlock()
	return j.source.Graph().HoldNodes(ctx, nodes...)
}

// quieten holds the source quiet and copies what is dirty, unless that is more than most bytes or
// fails, or the job was told to pause; then undrain is nil.
func (j *Job) quieten(ctx context.Context, h *jobs.Handle, most int64) (undrain func(), _ error) {
	end, err := j.source.Graph().Drain(ctx, j.source)
	switch {
	case err != nil && h.Context().Err() != nil:
		return nil, jobs.ErrCancelled
	case err != nil:
		return nil, err
	}
	defer func() {
		if undrain == nil { // also after a panic: guests wait
			end()
		}
	}()
	// The writes that were waited for may have failed to reach the target, and clients were told
	// what becomes of the job for that.
	if err := j.life.failure(); err != nil {
		return nil, err
	}
	if j.bits.Count() > most || j.site.Job.UserPaused() {
		return nil, nil
	}
	if err := j.copyQuiet(ctx); err != nil {
		return nil, err
	}
	h.SetRemaining(0)
	return end, nil
}

// failed does what the policies say about an error of copying with nothing in flight: nil means to
// try again.
func (j *Job) failed(h *jobs.Handle, err error) error {
	switch {
	case err == nil:
		return nil
	case h.Context().Err() != nil:
		return jobs.ErrCancelled
	case j.life.failure() != nil:
		return j.life.failure() // the policy was asked already
	}
	op, policy := j.side(err)
	action, stopped := h.OnErrorIdle(op, policy, err)
	switch {
	case stopped != nil:
		return stopped
	case action == types.BlockErrorActionReport:
		return err
	case action == types.BlockErrorActionIgnore:
		return h.Sleep(idle) // it is tried again, but not as fast as it fails
	}
	return nil
}

// copyQuiet copies what is dirty while the source is quiet: no gate is passed.
func (j *Job) copyQuiet(ctx context.Context) error {
	r := &blk.Req{Ctx: ctx, Job: true}
	j.asked = 0
	for {
		at, n, ok := j.bits.NextDirty(0, j.source.Size())
		if !ok {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if k, _ := j.longZeroes(r, at, n, j.longest()); k > 0 {
			n = k
		} else {
			n = min(n, max(maxCopy, j.granularity))
		}
		if err := j.copy(r, at, n); err != nil {
			return err
		}
	}
}

// catchUp is what makes the target equal again after a time of waiting. Whatever the policies are,
// an error ends the job: its work is over, it cannot pause any more, and who told it to finalize
// waits for the answer.
func (j *Job) catchUp(ctx context.Context, h *jobs.Handle) (err error) {
	if err := j.life.failure(); err != nil {
		return err
	}
	for range patience {
		if j.bits.Count() <= lastCopy {
			break
		}
		j.life.turn(true)
		if err := j.copyDirty(ctx, h); err != nil {
			return err
		}
	}
	if j.undrain, err = j.source.Graph().Drain(ctx, j.source); err != nil {
		return err
	}
	if err := j.life.failure(); err != nil {
		return err
	}
	if err := j.copyQuiet(ctx); err != nil {
		return err
	}
	h.SetRemaining(0)
	return j.writes.Edge().Flush(&blk.Req{Ctx: ctx})
}

// Prepare implements jobs.Preparer: it takes the job out of the graph and, if it was told to
// complete, puts the target in its place, all or nothing.
func (j *Job) Prepare(ctx context.Context, h *jobs.Handle) error {
	if j.held == nil {
		hold, err := j.holdNodes(ctx)
		if err != nil {
			return err
		}
		j.held = hold
	}
	j.life.to(ending)
	if j.undrain == nil {
		if err := j.catchUp(ctx, h); err != nil {
			return err
		}
	}
	ctx = context.WithoutCancel(ctx)
	tx := j.source.Graph().Begin(ctx)
	defer tx.Abort()
	if err := j.site.Leave(tx); err != nil {
		return err
	}
	opened, err := j.rebase(ctx, tx)
	if err != nil {
		return err
	}
	mode, err := j.pivot(tx)
	if err == nil {
		err = tx.RemoveFilter(j.site.Filter)
	}
	if err == nil {
		err = tx.Commit()
	}
	opened.Finish(err)
	if err == nil {
		j.site.Filter = nil
		if j.life.get().pivot {
			j.site.EndReadOnly(mode)
		}
	}
	return err
}

// pivot lets tx put the target in the place of what it replaces, if the job was told to complete.
// The nodes that it returns are to be read-only then: nobody writes to them any more.
func (j *Job) pivot(tx *graph.Tx) (readOnly []*graph.Node, _ error) {
	if !j.life.get().pivot {
		return nil, nil
	}
	old := j.source
	if j.replace != nil {
		if old = j.replace; !canReplace(j.source, old) {
			slog.Error("the target of a mirror cannot take the place of a node any more: what that shows would change",
				"target", j.target.Name(), "node", old.Name())
			return nil, blk.Text("Operation not permitted", syscall.EPERM)
		}
	}
	for _, n := range graph.Now.WithFiles(j.target) {
		switch {
		case j.target.ReadOnly():
		case old.ReadOnly():
			readOnly = append(readOnly, n)
		default: // an active commit may have made it writable for its time, which becomes for good
			if err := graph.SetLent(tx, n, false); err != nil {
				return nil, err
			}
		}
	}
	return readOnly, tx.ReplaceNode(old, j.target)
}

// canReplace tells whether a mirror of source may take the place of n: n shows the same data as
// source, in every use, or what uses it copes with others.
func canReplace(source, n *graph.Node) bool {
	for source != n {
		if d, ok := source.Driver().(graph.ChildReplacer); ok {
			return d.CanReplace(n)
		}
		e := source.FilteredChild()
		if e == nil {
			return false
		}
		source = e.Node()
	}
	return true
}

// Clean implements jobs.Cleaner.
func (j *Job) Clean(*jobs.Handle) {
	j.life.to(ended)
	if j.held == nil {
		j.held, _ = j.source.Graph().HoldNodes(context.Background(), j.source, j.target) // none if the graph is closed
	}
	defer j.held.Release()
	defer j.goOn()
	j.site.TakeOut(nil)
	j.dirty.Remove()
	j.goOn()
	j.site.Release()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.unblock != nil {
		j.unblock()
	}
}

// goOn lets guests go on if the source is held quiet.
func (j *Job) goOn() {
	if j.undrain != nil {
		j.undrain()
		j.undrain = nil
	}
}
