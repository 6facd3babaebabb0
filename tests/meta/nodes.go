package meta

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

// options are those of blockdev-add for m's node, its backing file apart.
func (w *world) options(m *image, r *rand.Rand) *types.BlockdevOptions {
	o := &types.BlockdevOptions{Driver: m.format, NodeName: rig.Ptr(m.name()), ReadOnly: rig.Ptr(m.ro)}
	switch r.IntN(5) {
	case 0:
	case 1:
		o.Discard = rig.Ptr(types.BlockdevDiscardOptionsIgnore)
	default:
		o.Discard = rig.Ptr(types.BlockdevDiscardOptionsUnmap)
		if r.IntN(4) == 0 {
			o.DetectZeroes = rig.Ptr(types.BlockdevDetectZeroesOptionsUnmap)
		}
	}
	if o.DetectZeroes == nil && r.IntN(4) == 0 {
		o.DetectZeroes = rig.Ptr(types.BlockdevDetectZeroesOptionsOn)
	}
	if r.IntN(4) == 0 {
		o.Cache = &types.BlockdevCacheOptions{NoFlush: rig.Ptr(true)}
	}
	switch m.format {
	case types.BlockdevDriverFile:
		o.U = w.x.File(m.file()).Definition.U
		return o
	case types.BlockdevDriverRaw:
		o.U = &types.BlockdevOptionsRaw{File: w.x.File(m.file())}
		return o
	}
	q := &types.BlockdevOptionsQcow2{File: w.x.File(m.file())}
	if r.IntN(2) == 0 {
		q.L2CacheSize, q.RefcountCacheSize = rig.Ptr(int64(1)), rig.Ptr(int64(1))
		q.L2CacheEntrySize = rig.Ptr(min(int64(m.shape.cs), pick[int64](r, 512, 4096)))
	}
	if r.IntN(4) == 0 && !m.shape.v2 {
		q.LazyRefcounts = rig.Ptr(r.IntN(2) == 0)
	}
	if r.IntN(8) == 0 {
		q.DiscardNoUnref = rig.Ptr(!m.shape.v2)
	}
	if r.IntN(4) == 0 {
		q.PassDiscardOther = rig.Ptr(true)
	}
	if r.IntN(3) == 0 {
		q.OverlapCheck = &types.Qcow2OverlapChecks{Mode: rig.Ptr(pick(r, types.Qcow2OverlapCheckModeNone,
			types.Qcow2OverlapCheckModeConstant, types.Qcow2OverlapCheckModeCached, types.Qcow2OverlapCheckModeAll))}
	}
	o.U = q
	return o
}

// add opens an image and what it backs on: by name what has a node, else by the headers.
func (w *world) add(m *image, o Op) error {
	if !m.closed {
		// The name is taken, or another node has it open; only the former is an error.
		if !m.own {
			return nil
		}
		w.did("add %s again", m.name())
		m2 := *m
		return expect(w.x.Nodes.Add(w.ctx, w.options(&m2, rnd(o))), "the name is taken")
	}
	r := rnd(o)
	m.ro = r.IntN(6) == 0
	opt := w.options(m, r)
	how := ""
	if b := m.backing; b != nil {
		if b.closed && r.IntN(3) == 0 {
			if err := w.add(b, Op{"add", b.slot, o.B, o.C, o.D, o.A}); err != nil {
				return err
			}
		}
		if j := w.jobOn(b); j != nil && j.pivots && j.chain[0] == b {
			return nil // it would move with the guests
		}
		if !b.closed {
			n := w.node(b)
			opt.U.(*types.BlockdevOptionsQcow2).Backing = &types.BlockdevRefOrNull{Reference: rig.Ptr(n.Name())}
			how = " with backing " + n.Name()
		} else if !w.closedBelow(b) {
			return nil // its chain is open in part: two nodes would have one file
		}
	}
	w.did("add %s%s, read-only %v, %s", m.name(), how, m.ro, describe(opt))
	err := w.x.Nodes.Add(w.ctx, opt)
	if m.backing != nil && !m.backing.closed && w.busy(m.backing) && err != nil {
		return nil // a job has it
	}
	if err != nil {
		return err
	}
	m.closed, m.own = false, true
	for b := m.backing; b != nil && b.closed; b = b.backing {
		b.closed, b.own, b.ro = false, false, true
	}
	return nil
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

func (w *world) closedBelow(m *image) bool {
	for ; m != nil; m = m.backing {
		if !m.closed {
			return false
		}
	}
	return true
}

// del deletes a node, or tries.
func (w *world) del(m *image, o Op) error {
	if m.closed {
		return nil
	}
	if err := w.joined(m); err != nil {
		return err
	}
	n := w.node(m)
	if n == nil {
		return fmt.Errorf("%s has no node", m.name())
	}
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
		if err := w.settle(m); err != nil {
			return err
		}
		if m.closed {
			return nil // a commit that has ended drops what it made superfluous
		}
		if len(w.dependents(m, true)) > 0 {
			fails = "another node backs on it"
		}
	}
	w.did("del %s (%s): %s", m.name(), n.Name(), fails)
	if err := expect(w.x.Nodes.Del(w.ctx, n.Name()), fails); err != nil || fails != "" {
		return err
	}
	m.closed, m.own = true, false
	m.bitmaps = slices.DeleteFunc(m.bitmaps, func(b *dirty) bool { return !b.persistent })
	w.prune()
	return nil
}

// rm removes an image that nobody needs, after a check.
func (w *world) rm(m *image, o Op) error {
	if !m.closed || len(w.dependents(m, false)) > 0 {
		return nil
	}
	w.did("rm %s", m.name())
	if err := w.checkImage(m); err != nil {
		return err
	}
	w.images[m.slot] = nil
	return w.x.RemoveFile(m.file())
}

// snapshot puts a new overlay above a node, under its guests.
func (w *world) snapshot(m *image, o Op) error {
	if m.closed || !m.own || w.busy(m) || len(w.dependents(m, false)) > 0 || len(m.data) == 0 {
		return nil
	}
	r := rnd(o)
	top := &image{slot: -1, format: types.BlockdevDriverQcow2, shape: randomShape(r), backing: m, closed: true}
	for i, x := range w.images {
		if x == nil {
			top.slot = i
			break
		}
	}
	if top.slot < 0 {
		return nil
	}
	if m.bg == nil {
		// With a background the content is copied when that has ended; see joined.
		top.data = append([]byte(nil), m.data...)
	} else {
		top.data = make([]byte, len(m.data))
	}
	if err := w.createQcow2(top, r); err != nil {
		return err
	}
	opt := w.options(top, r)
	opt.U.(*types.BlockdevOptionsQcow2).Backing = &types.BlockdevRefOrNull{Null: true}
	if err := w.x.Nodes.Add(w.ctx, opt); err != nil {
		return err
	}
	w.did("snapshot %s above %s, %s", top.name(), m.name(), describe(opt))
	base, over := w.node(m), w.x.Graph.Node(top.name())
	tx := w.x.Graph.Begin(w.ctx)
	defer tx.Abort()
	if _, err := tx.InsertFilter(over, "backing", base); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	top.closed, top.own = false, true
	top.guest, top.canSet, top.bg = m.guest, m.canSet, m.bg
	m.guest, m.canSet, m.bg = nil, false, nil
	if top.bg != nil {
		// Part of what it wrote went to m, part to top: m's own content in its range is not known.
		return w.adopt(m, top)
	}
	return nil
}

// adopt ends the background that a snapshot has passed under and reads what it left in the image
// below.
func (w *world) adopt(m, top *image) error {
	bg := top.bg
	copy(top.data, m.data)
	if err := w.joined(top); err != nil {
		return err
	}
	root, err := w.x.AttachRoot(w.ctx, w.node(m), true)
	if err != nil {
		return err
	}
	g := &rootGuest{root: root, w: w}
	defer g.close()
	return g.read(m.data[bg.lo:bg.hi], int64(bg.lo))
}

// resize changes a size, under guests that allow it.
func (w *world) resize(m *image, o Op) error {
	if m.closed || !m.own || w.busy(m) || len(w.dependents(m, false)) > 0 {
		return nil
	}
	if err := w.joined(m); err != nil {
		return err
	}
	r := rnd(o)
	size := len(m.data)
	switch r.IntN(3) {
	case 0:
		size += 512 * (1 + r.IntN(m.shape.cs/512+1))
	case 1:
		size += r.IntN(4*m.shape.cs/512+1) * 512
	default:
		size -= min(size-8192, r.IntN(min(4*m.shape.cs, size)/512)*512)
	}
	size = max(8192, min(size, 6<<20)) / m.shape.align * m.shape.align
	fails := ""
	if _, ok := m.guest.(*nbdGuest); ok {
		fails = "an export promises the size"
	} else if m.ro {
		fails = "it is read-only"
	}
	w.did("resize %s from %d to %d: %s", m.name(), len(m.data), size, fails)
	err := w.x.Nodes.Resize(w.ctx, nil, rig.Ptr(m.name()), int64(size))
	if err != nil && m.shape.v2 && m.backing != nil && size > len(m.data) {
		return w.verify(m, o) // nothing hides the backing file
	}
	if err := expect(err, fails); err != nil || fails != "" {
		return err
	}
	if n := w.node(m).Size(); n != int64(size) {
		return fmt.Errorf("the size is %d", n)
	}
	m.data = resized(m.data, size)
	m.grown()
	return nil
}

// resized is data of another size; nil stays nil.
func resized(data []byte, size int) []byte {
	switch {
	case data == nil:
		return nil
	case size <= len(data):
		return data[:size:size]
	}
	return append(data[:len(data):len(data)], make([]byte, size-len(data))...)
}

// query asks what a client might ask.
func (w *world) query(m *image, o Op) error {
	if b := w.x.Nodes.AppendNamedNodes(nil, o.A%2 == 0); len(b) == 0 {
		return errors.New("no answer")
	}
	w.x.Nodes.AppendNodeStats(nil)
	w.x.Nodes.DebugGraph()
	w.x.Jobs.Query()
	w.x.Exports.Query()
	return nil
}

// end takes everything back, checks that nothing is left, and looks at all images.
func (w *world) end() error {
	w.did("end")
	for len(w.jobs) > 0 {
		if err := w.finishJob(w.jobs[0]); err != nil {
			return err
		}
	}
	for _, m := range w.images {
		if m == nil || m.closed {
			continue
		}
		if m.unknown {
			if err := w.learn(m); err != nil {
				return err
			}
		}
		if err := errors.Join(w.joined(m), w.verify(m, Op{}), w.detach(m, Op{})); err != nil {
			return fmt.Errorf("end, %s: %w", m.name(), err)
		}
	}
	for again := true; again; {
		again = false
		for _, m := range w.images {
			if m != nil && m.own && len(w.dependents(m, true)) == 0 {
				if err := w.del(m, Op{}); err != nil {
					return err
				}
				again = true
			}
		}
	}
	if err := w.x.Left(); err != nil {
		return err
	}
	for _, m := range w.images {
		if m != nil {
			if err := w.checkImage(m); err != nil {
				return fmt.Errorf("end, %s: %w", m.name(), err)
			}
		}
	}
	return w.outside()
}

// checkImage opens an image with all that its header names and compares; a qcow2 image is checked.
func (w *world) checkImage(m *image) error {
	if m.format == types.BlockdevDriverQcow2 {
		res, err := w.x.Check(w.ctx, m.file())
		if err != nil {
			return err
		}
		if m.leaky {
			res.Leaks = 0
		}
		if res.Corruptions+res.Leaks+res.Errors > 0 {
			return fmt.Errorf("check: %+v", *res)
		}
	}
	if m.backing != nil && !w.closedBelow(m.backing) {
		return nil
	}
	o := &types.BlockdevOptions{Driver: m.format, ReadOnly: rig.Ptr(true)}
	switch m.format {
	case types.BlockdevDriverFile:
		o.U = w.x.File(m.file()).Definition.U
	case types.BlockdevDriverRaw:
		o.U = &types.BlockdevOptionsRaw{File: w.x.File(m.file())}
	default:
		o.U = &types.BlockdevOptionsQcow2{File: w.x.File(m.file())}
	}
	root, err := w.x.Nodes.OpenRoot(w.ctx, &types.BlockdevRef{Definition: o}, graph.RootSpec{EdgeName: "root", Claim: readClaim})
	if err != nil {
		return err
	}
	if n := root.Size(); n != int64(len(m.data)) {
		return fmt.Errorf("the size is %d instead of %d", n, len(m.data))
	}
	g := &rootGuest{root: root, w: w}
	got := make([]byte, len(m.data))
	err = g.read(got, 0)
	if err == nil && !m.unknown {
		err = same(got, m.data, 0)
	}
	return errors.Join(err, g.close())
}

// outside has qemu-img look at the images, and read those that no other one backs on.
func (w *world) outside() error {
	if !w.qemuImg {
		return nil
	}
	for _, m := range w.images {
		if m != nil && w.x.Dir == "" {
			if err := w.x.Save(m.file(), filepath.Join(w.dir, m.file())); err != nil {
				return err
			}
		}
	}
	for _, m := range w.images {
		if m == nil || m.format != types.BlockdevDriverQcow2 {
			continue
		}
		if out, err := w.qemu("check", "-q", m.file()); err != nil && !(m.leaky && onlyLeaks(err)) {
			return fmt.Errorf("qemu-img check of %s: %w\n%s", m.name(), err, out)
		}
		if len(w.dependents(m, false)) > 0 || m.unknown {
			continue
		}
		if out, err := w.qemu("convert", "-O", "raw", m.file(), "raw"); err != nil {
			return fmt.Errorf("qemu-img convert of %s: %w\n%s", m.name(), err, out)
		}
		got, err := os.ReadFile(filepath.Join(w.dir, "raw"))
		if err != nil {
			return err
		}
		if len(got) != len(m.data) {
			return fmt.Errorf("qemu-img finds %d bytes in %s instead of %d", len(got), m.name(), len(m.data))
		}
		if err := same(got, m.data, 0); err != nil {
			return fmt.Errorf("qemu-img, %s: %w", m.name(), err)
		}
	}
	return nil
}

func (w *world) qemu(args ...string) ([]byte, error) {
	cmd := exec.CommandContext(w.ctx, "qemu-img", args...)
	cmd.Dir = w.dir
	return cmd.CombinedOutput()
}

// onlyLeaks tells whether qemu-img check has found nothing else.
func onlyLeaks(err error) bool {
	var e *exec.ExitError
	return errors.As(err, &e) && e.ExitCode() == 3
}
