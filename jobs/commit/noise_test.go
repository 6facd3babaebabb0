package commit_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// noisy is a disk that grows by noise, as encrypted ones do, or cannot grow: then it refuses writes
// behind its end, or ignores them, as null-co does.
type noisy struct {
	*drivertest.MemFile
	fixed, ignores bool
}

func (d noisy) Caps() graph.Caps {
	c := d.MemFile.Caps()
	c.ZeroInit = false
	return c
}

func (d noisy) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	if d.fixed {
		return blk.Text("Cannot grow it", syscall.EINVAL)
	}
	old := d.Size()
	if err := d.MemFile.Resize(ctx, size, m); err != nil || old >= size {
		return err
	}
	d.Poke(old, bytes.Repeat([]byte{0xA5}, int(size-old)))
	return nil
}

func (d noisy) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	switch {
	case !d.fixed || off+v.Len() <= d.Size():
	case d.ignores:
		return nil
	default:
		return syscall.ENOSPC
	}
	return d.MemFile.WriteAt(r, v, off, f)
}

func (d noisy) Zero(*blk.Req, int64, int64, blk.Flags) error { return blk.ErrNotSupported }

// noisyWorld is a disk of 4 clusters below two layers of 80, which hold little.
func noisyWorld(t *testing.T, fixed, ignores bool) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, base: 80, active: 80, Events: jobtest.NewEvents(), nodes: map[string]*graph.Node{},
		files: map[string]*drivertest.Fault{"base": drivertest.NewFault(drivertest.NewMemFile(0))}}
	w.m = jobs.NewManager(w, nil)
	base := drivertest.AddNode(t, g, "base", noisy{drivertest.MemFileOf(bytes.Repeat([]byte{0xba}, 4*cluster)), fixed, ignores})
	w.nodes["base"] = base
	below := base
	for _, name := range []string{"top", "active"} {
		w.files[name] = drivertest.NewFault(drivertest.NewMemFile(0))
		w.nodes[name] = jobtest.Layer(t, g, name, w.files[name], 80*cluster, below)
		below = w.nodes[name]
		jobtest.Visit(t, below, func(root *graph.Root) error {
			return errors.Join(jobtest.Write(root, 2*cluster, []byte(name)), jobtest.Write(root, 33*cluster, []byte(name)))
		})
	}
	w.guest = drivertest.AddRoot(t, g, w.nodes["active"], drivertest.Writer)
	w.want = w.read()
	return w
}

// What the layers do not hold behind the end of the base reads as zeroes while a base that grows by
// noise grows, and then.
func TestNoisyBase(t *testing.T) {
	for _, active := range []bool{false, true} {
		w := noisyWorld(t, false, false)
		a := w.args()
		if active {
			a.TopNode = nil
		}
		stop := w.readers()
		j := w.start(a)
		if active {
			if !w.Await(jobtest.InState(types.JobStatusReady)) {
				t.Fatal(j.Err())
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		err := w.finished(j)
		stop()
		if n := w.nodes["base"].Size(); err != nil || n != 80*cluster || !bytes.Equal(w.read(), w.want) {
			t.Errorf("active %v: %v, the base has %d bytes, or the guest reads something else", active, err, n)
		}
	}
}

// A base that cannot grow says so itself.
func TestBaseThatCannotGrow(t *testing.T) {
	for i := range 4 {
		active, ignores := i&1 != 0, i&2 != 0
		w := noisyWorld(t, true, ignores)
		a := w.args()
		if active {
			a.TopNode = nil
		}
		if err := w.finished(w.start(a)); err != syscall.EINVAL {
			t.Errorf("active %v, ignores %v: %v", active, ignores, err)
		}
		if n := w.nodes["base"].Size(); n != 4*cluster {
			t.Errorf("active %v, ignores %v: the base has %d bytes", active, ignores, n)
		}
	}
}
