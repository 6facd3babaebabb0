package meta

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// options are those of blockdev-add for m's node, its backing file apart.
func (o *op) options(m *image) *types.BlockdevOptions {
	opt := &types.BlockdevOptions{Driver: m.format, NodeName: rig.Ptr(m.name()), ReadOnly: rig.Ptr(m.ro), U: o.onFile(m)}
	switch o.r.IntN(5) {
	case 0:
	case 1:
		opt.Discard = rig.Ptr(types.BlockdevDiscardOptionsIgnore)
	default:
		opt.Discard = rig.Ptr(types.BlockdevDiscardOptionsUnmap)
		if o.r.IntN(4) == 0 {
			opt.DetectZeroes = rig.Ptr(types.BlockdevDetectZeroesOptionsUnmap)
		}
	}
	if opt.DetectZeroes == nil && o.r.IntN(4) == 0 {
		opt.DetectZeroes = rig.Ptr(types.BlockdevDetectZeroesOptionsOn)
	}
	if o.r.IntN(4) == 0 {
		opt.Cache = &types.BlockdevCacheOptions{NoFlush: rig.Ptr(true)}
	}
	q, ok := opt.U.(*types.BlockdevOptionsQcow2)
	if !ok {
		return opt
	}
	if o.r.IntN(2) == 0 {
		q.L2CacheSize, q.RefcountCacheSize = rig.Ptr(int64(1)), rig.Ptr(int64(1))
		q.L2CacheEntrySize = rig.Ptr(min(int64(m.shape.cs), trial.Pick[int64](o.r, 512, 4096)))
	}
	if o.r.IntN(4) == 0 && !m.shape.v2 {
		q.LazyRefcounts = rig.Ptr(o.r.IntN(2) == 0)
	}
	if o.r.IntN(8) == 0 {
		q.DiscardNoUnref = rig.Ptr(!m.shape.v2)
	}
	if o.r.IntN(4) == 0 {
		q.PassDiscardOther = rig.Ptr(true)
	}
	if o.r.IntN(3) == 0 {
		q.OverlapCheck = &types.Qcow2OverlapChecks{Mode: rig.Ptr(trial.Pick(o.r, types.Qcow2OverlapCheckModeNone,
			types.Qcow2OverlapCheckModeConstant, types.Qcow2OverlapCheckModeCached, types.Qcow2OverlapCheckModeAll))}
	}
	return opt
}

// onFile are the options of m's format on its file.
func (w *world) onFile(m *image) any {
	file := w.x.File(m.file())
	switch m.format {
	case types.BlockdevDriverFile:
		return file.Definition.U
	case types.BlockdevDriverRaw:
		return &types.BlockdevOptionsRaw{File: file}
	}
	return &types.BlockdevOptionsQcow2{File: file}
}

// add opens an image and what it backs on: by name what has a node, else by the headers.
func (o *op) add(m *image) {
	if !m.closed {
		// The name is taken, or another node has it open; only the former is an error.
		if !m.own {
			return
		}
		o.did("add %s again", m.name())
		m2 := *m
		expect(o.x.Nodes.Add(o.ctx, o.options(&m2)), "the name is taken")
		return
	}
	m.ro = o.r.IntN(6) == 0
	opt := o.options(m)
	how := ""
	if b := m.backing; b != nil {
		if b.closed && o.r.IntN(3) == 0 {
			o.at(Op{"add", b.slot, o.B, o.C, o.D, o.A}).add(b)
		}
		if j := o.jobOn(b); j != nil && j.pivots && j.chain[0] == b {
			return // it would move with the guests
		}
		if !b.closed {
			n := o.node(b)
			opt.U.(*types.BlockdevOptionsQcow2).Backing = backing(n)
			how = " with backing " + n.Name()
		} else if !b.closedBelow() {
			return // its chain is open in part: two nodes would have one file
		}
	}
	o.did("add %s%s, read-only %v, %s", m.name(), how, m.ro, describe(opt))
	err := o.x.Nodes.Add(o.ctx, opt)
	if m.backing != nil && !m.backing.closed && o.busy(m.backing) && err != nil {
		return // a job has it
	}
	trial.Must(err)
	m.closed, m.own = false, true
	for b := m.backing; b != nil && b.closed; b = b.backing {
		b.closed, b.own, b.ro = false, false, true
	}
}

func describe(o *types.BlockdevOptions) string {
	s := ""
	if o.Discard != nil {
		s += " discard " + string(*o.Discard)
	}
	if o.DetectZeroes != nil {
		s += " detect-zeroes " + string(*o.DetectZeroes)
	}
	if q, ok := o.U.(*types.BlockdevOptionsQcow2); ok {
		s += fmt.Sprintf(" small caches %v, no-unref %v", q.L2CacheSize != nil, q.DiscardNoUnref != nil)
	}
	return s
}

// closedBelow tells whether m and all that it backs on have no nodes.
func (m *image) closedBelow() bool { return m == nil || m.closed && m.backing.closedBelow() }

// del deletes a node, or tries.
func (w *world) del(m *image) {
	if m.closed {
		return
	}
	w.joined(m)
	n := w.mustNode(m)
	fails := ""
	switch {
	case !m.own:
		fails = "it belongs to another node"
	case m.guest != nil:
		fails = "it has a guest"
	case len(w.dependents(m, true)) > 0:
		fails = "another node backs on it"
	case w.busy(m):
		// The job may be over by the time it is asked.
		w.settle(m)
		if m.closed {
			return // a commit that has ended drops what it made superfluous
		}
		if len(w.dependents(m, true)) > 0 {
			fails = "another node backs on it"
		}
	}
	w.did("del %s (%s): %s", m.name(), n.Name(), fails)
	if expect(w.x.Nodes.Del(w.ctx, n.Name()), fails) {
		return
	}
	m.closed, m.own = true, false
	m.bitmaps = slices.DeleteFunc(m.bitmaps, func(b *dirty) bool { return !b.persistent })
	w.prune()
}

// rm removes an image that nobody needs, after a check.
func (w *world) rm(m *image) {
	if !m.closed || len(w.dependents(m, false)) > 0 {
		return
	}
	w.did("rm %s", m.name())
	w.checkImage(m)
	w.images[m.slot] = nil
	trial.Must(w.x.RemoveFile(m.file()))
}

// snapshot puts a new overlay above a node, under its guests.
func (o *op) snapshot(m *image) {
	if m.closed || !m.own || o.busy(m) || len(o.dependents(m, false)) > 0 || len(m.data) == 0 {
		return
	}
	top := &image{slot: o.free(), format: types.BlockdevDriverQcow2, shape: randomShape(o.r), backing: m, closed: true}
	if top.slot < 0 {
		return
	}
	if m.bg == nil {
		// With a background the content is copied when that has ended; see joined.
		top.data = bytes.Clone(m.data)
	} else {
		top.data = make([]byte, len(m.data))
	}
	o.createQcow2(top)
	opt := o.options(top)
	opt.U.(*types.BlockdevOptionsQcow2).Backing = &types.BlockdevRefOrNull{Null: true}
	trial.Must(o.x.Nodes.Add(o.ctx, opt))
	o.did("snapshot %s above %s, %s", top.name(), m.name(), describe(opt))
	base, over := o.node(m), o.x.Graph.Node(top.name())
	tx := o.x.Graph.Begin(o.ctx)
	defer tx.Abort()
	trial.Get(tx.InsertFilter(over, "backing", base))
	trial.Must(tx.Commit())
	top.closed, top.own = false, true
	m.passGuest(top)
	if top.bg, m.bg = m.bg, nil; top.bg != nil {
		// Part of what it wrote went to m, part to top: m's own content in its range is not known.
		o.adopt(m, top)
	}
}

// adopt ends the background that a snapshot has passed under and reads what it left in the image
// below.
func (w *world) adopt(m, top *image) {
	bg := top.bg
	copy(top.data, m.data)
	w.joined(top)
	w.reading(w.node(m), func(g guest) { trial.Must(g.read(m.data[bg.lo:bg.hi], int64(bg.lo))) })
}

// resize changes a size, under guests that allow it.
func (o *op) resize(m *image) {
	if m.closed || !m.own || o.busy(m) || len(o.dependents(m, false)) > 0 {
		return
	}
	o.joined(m)
	size := len(m.data)
	switch o.r.IntN(3) {
	case 0:
		size += 512 * (1 + o.r.IntN(m.shape.cs/512+1))
	case 1:
		size += o.r.IntN(4*m.shape.cs/512+1) * 512
	default:
		size -= min(size-8192, o.r.IntN(min(4*m.shape.cs, size)/512)*512)
	}
	size = max(8192, min(size, 6<<20)) / m.shape.align * m.shape.align
	fails := ""
	if _, ok := m.guest.(*nbdGuest); ok {
		fails = "an export promises the size"
	} else if m.ro {
		fails = "it is read-only"
	}
	o.did("resize %s from %d to %d: %s", m.name(), len(m.data), size, fails)
	err := o.x.Nodes.Resize(o.ctx, nil, rig.Ptr(m.name()), int64(size), blk.PreallocOff)
	if err != nil && m.shape.v2 && m.backing != nil && size > len(m.data) {
		o.verify(m) // nothing hides the backing file
		return
	}
	if expect(err, fails) {
		return
	}
	if n := o.node(m).Size(); n != int64(size) {
		trial.Fail("the size is %d", n)
	}
	m.data = trial.Resized(m.data, size)
	m.grown()
}

// query asks what a client might ask.
func (o *op) query(m *image) {
	if b, err := o.x.Nodes.NamedNodes(o.A%2 == 0, func(int64) error { return nil }); err != nil || len(b) == 0 {
		trial.Fail("no answer")
	}
	o.x.Nodes.AppendNodeStats(nil)
	o.x.Nodes.DebugGraph()
	o.x.Jobs.Query()
	o.x.Exports.Query()
}

// end takes everything back, checks that nothing is left, and looks at all images.
func (w *world) end() {
	w.did("end")
	for len(w.jobs) > 0 {
		w.bring(w.jobs[0], true)
	}
	for _, m := range w.images {
		if m == nil || m.closed {
			continue
		}
		if m.unknown {
			w.learn(m)
		}
		trial.In("end, "+m.name(), func() {
			w.joined(m)
			w.verify(m)
			w.detach(m)
		})
	}
	for again := true; again; {
		again = false
		for _, m := range w.images {
			if m != nil && m.own && len(w.dependents(m, true)) == 0 {
				w.del(m)
				again = true
			}
		}
	}
	trial.Must(w.x.Left())
	for _, m := range w.images {
		if m != nil {
			trial.In("end, "+m.name(), func() { w.checkImage(m) })
		}
	}
	w.outside()
}

// checkImage opens an image with all that its header names and compares; a qcow2 image is checked.
func (w *world) checkImage(m *image) {
	if m.format == types.BlockdevDriverQcow2 {
		res := trial.Get(w.x.Check(w.ctx, m.file()))
		if m.leaky {
			res.Leaks = 0
		}
		if res.Corruptions+res.Leaks+res.Errors > 0 {
			trial.Fail("check: %+v", *res)
		}
	}
	if !m.backing.closedBelow() {
		return
	}
	o := &types.BlockdevOptions{Driver: m.format, ReadOnly: rig.Ptr(true), U: w.onFile(m)}
	root := trial.Get(w.x.Nodes.OpenRoot(w.ctx, &types.BlockdevRef{Definition: o},
		graph.RootSpec{EdgeName: "root", Claim: drivertest.Reader}))
	g := &rootGuest{root: root, w: w}
	got := make([]byte, root.Size())
	trial.Must(errors.Join(g.read(got, 0), g.close()))
	if len(got) != len(m.data) {
		trial.Fail("the size is %d instead of %d", len(got), len(m.data))
	}
	if !m.unknown {
		trial.Must(trial.Same(got, m.data, 0))
	}
}

// outside has qemu-img look at the images, and read those that no other one backs on.
func (w *world) outside() {
	if !w.qemuImg {
		return
	}
	qemuImg := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(w.ctx, "qemu-img", args...)
		cmd.Dir = w.dir
		return cmd.CombinedOutput()
	}
	for _, m := range w.images {
		if m != nil && w.x.Dir == "" {
			trial.Must(w.x.Save(m.file(), filepath.Join(w.dir, m.file())))
		}
	}
	for _, m := range w.images {
		if m == nil || m.format != types.BlockdevDriverQcow2 {
			continue
		}
		if out, err := qemuImg("check", "-q", m.file()); err != nil && !(m.leaky && onlyLeaks(err)) {
			trial.Fail("qemu-img check of %s: %w\n%s", m.name(), err, out)
		}
		if len(w.dependents(m, false)) > 0 || m.unknown {
			continue
		}
		if out, err := qemuImg("convert", "-O", "raw", m.file(), "raw"); err != nil {
			trial.Fail("qemu-img convert of %s: %w\n%s", m.name(), err, out)
		}
		got := trial.Get(os.ReadFile(filepath.Join(w.dir, "raw")))
		if err := trial.Same(got, m.data, 0); err != nil {
			trial.Fail("qemu-img, %s: %w", m.name(), err)
		}
	}
}

// onlyLeaks tells whether qemu-img check has found nothing else.
func onlyLeaks(err error) bool {
	var e *exec.ExitError
	return errors.As(err, &e) && e.ExitCode() == 3
}
