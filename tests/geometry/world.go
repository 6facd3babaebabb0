package geometry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// world is a sample's graph beside what it has to show.
type world struct {
	Sample
	space  space
	x      *rig.Rig
	ctx    context.Context
	r      *rand.Rand
	data   []byte   // what guests see
	layers [][]byte // what each layer shows before the job begins
	target []byte   // the same of the target
	under  []byte   // and of its own backing file
	filled []span   // what was written to the source before the job began, recorded by its bitmap

	mu     sync.Mutex
	faults map[string]*drivertest.Fault // as the files are open now
	opened []*drivertest.Fault          // ever
	armed  bool                         // files that are opened may fail, too
	struck bool
	medium map[string]*drivertest.CrashFile
	power  *power
	units  atomic.Int64 // of work done
	reopen string       // what is opened by its header in the end, and shows data
}

// span is a part of a disk.
type span struct{ off, n int64 }

func newWorld(ctx context.Context, s Sample, dir string) *world {
	w := &world{Sample: s, space: s.space(), x: rig.New(dir), ctx: ctx, r: rand.New(rand.NewPCG(s.Seed, 2)),
		faults: map[string]*drivertest.Fault{}, medium: map[string]*drivertest.CrashFile{}}
	if w.x.Store == nil {
		return w
	}
	w.x.Store.Wrap(func(name string, d graph.Driver) graph.Driver {
		f := drivertest.NewFault(d)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.faults[name] = f
		w.opened = append(w.opened, f)
		w.armFile(name, f)
		return f
	})
	return w
}

// build makes all images and opens them.
func (w *world) build() {
	w.layers = make([][]byte, len(w.Layers))
	var below []byte
	for i := len(w.Layers) - 1; i >= 0; i-- {
		name, under := layer(i), ""
		if i+1 < len(w.Layers) {
			under = layer(i + 1)
		}
		shown := trial.Resized(below, w.model(w.Layers[i]))
		trial.In(name, func() { w.filled = w.image(name, w.Layers[i], under, under, shown) }) // of the top in the end
		w.layers[i], below = shown, shown
	}
	w.data = slices.Clone(below)
	if w.Kind != "mirror" && w.Kind != "backup" {
		return
	}
	size := w.model(w.Target)
	w.target = make([]byte, size)
	header, open := "", ""
	switch {
	case w.Under == "own":
		l := w.Layers[0]
		l.Size = w.Target.Size / 3 / 512 * 512
		w.under = make([]byte, w.model(l))
		w.image("u", l, "", "", w.under)
		header, open = "u", "u"
		w.target = trial.Resized(w.under, size)
	case w.Under == "source":
		w.target = slices.Clone(w.data)
	case w.Under != "":
		header = "l1"
		if w.Under == "chain" {
			open = "l1"
		}
		w.target = trial.Resized(w.layers[1], size)
	}
	if w.Drive.Mode != types.NewImageModeAbsolutePaths {
		w.image("t", w.Target, header, open, w.target)
	}
	if w.Drive.Mode != "" {
		w.namedOnly()
	}
}

// model is how many bytes the model has of an image.
func (w *world) model(l Layer) int { return int(w.space.model(blk.AlignUp(l.Size, 512))) }

// layer is the name of one.
func layer(i int) string { return fmt.Sprint("l", i) }

// layer is the image of that name.
func (w *world) layer(name string) Layer {
	switch {
	case name == "u":
		return w.Layers[0]
	case name[0] == 'l':
		return w.Layers[name[1]-'0']
	}
	return w.Target
}

func (w *world) format(name string) types.BlockdevDriver {
	if w.layer(name).Raw {
		return types.BlockdevDriverRaw
	}
	return types.BlockdevDriverQcow2
}

// image makes an image on top of the file called header, opens it on the node called open, and
// writes to it what a seed says: shown is brought up to date.
func (w *world) image(name string, l Layer, header, open string, shown []byte) (done []span) {
	size := int64(0)
	if l.Raw {
		size = l.Size
	}
	w.file(name, size)
	if !l.Raw {
		c := types.BlockdevCreateOptionsQcow2{Size: uint64(l.Size), ClusterSize: rig.Ptr(uint64(l.Cluster))}
		if l.V2 {
			c.Version = rig.Ptr(types.BlockdevQcow2VersionV2)
		} else {
			c.RefcountBits = &l.Bits
			if l.Zstd {
				c.CompressionType = rig.Ptr(types.Qcow2CompressionTypeZstd)
			}
		}
		if header != "" {
			c.BackingFile, c.BackingFmt = rig.Ptr(w.x.Path(header)), rig.Ptr(w.format(header))
		} else if l.Prealloc {
			c.Preallocation = rig.Ptr(types.PreallocModeMetadata)
		}
		trial.Must(w.x.CreateQcow2(w.ctx, name, c))
	}
	b := &types.BlockdevRefOrNull{Null: true}
	if open != "" {
		b = &types.BlockdevRefOrNull{Reference: &open}
	}
	trial.Must(w.x.Nodes.Add(w.ctx, w.options(name, l, b)))
	if l.Fill > 0 {
		w.with(name, false, func(root *graph.Root) { done = w.fill(root, l, shown) })
	}
	return done
}

// file makes a file, of any of the kinds there are.
func (w *world) file(name string, size int64) {
	if w.x.Store == nil {
		trial.Must(w.x.MakeFile(name, size, nil))
		return
	}
	o := drivertest.MemOptions{}
	if trial.One(w.r, 2) || w.space != nil {
		o.WriteFlags = blk.FUA | blk.WriteUnchanged
		o.ZeroFlags = blk.FUA | blk.WriteUnchanged | blk.MayUnmap | blk.NoFallback
	}
	switch k := w.r.IntN(8); {
	case k == 2:
		o.Slow = true
	case w.space != nil: // what cannot be zeroed fast takes its time
	case k == 0:
		o.NoZero, o.ZeroFlags = true, 0
	case k == 1:
		o.NoDiscard = true
	case k == 3:
		o.Limits.MaxTransfer, o.Limits.MaxZero = 32768, 65536
	}
	m := drivertest.CrashFileOf(drivertest.NewMemFileOptions(size, o))
	w.medium[name] = m
	w.x.Store.Put(name, m.MemFile)
}

// options are those of an image's node; the backing file nil: as its header says.
func (w *world) options(name string, l Layer, b *types.BlockdevRefOrNull) *types.BlockdevOptions {
	o := &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: &name,
		Discard: rig.Ptr(types.BlockdevDiscardOptionsIgnore)}
	if l.Discard {
		o.Discard = rig.Ptr(types.BlockdevDiscardOptionsUnmap)
	}
	if l.Detect != "off" && l.Detect != "" {
		o.DetectZeroes = rig.Ptr(types.BlockdevDetectZeroesOptions(l.Detect))
	}
	file := w.x.File(name)
	file.Definition.Discard = o.Discard
	if l.Raw {
		o.Driver, o.U = types.BlockdevDriverRaw, &types.BlockdevOptionsRaw{File: file}
	} else {
		o.U = &types.BlockdevOptionsQcow2{File: file, Backing: b}
	}
	return o
}

// unit calls f in a unit of work.
func (w *world) unit(root *graph.Root, f func(r *blk.Req) error) error {
	r, err := root.Begin(w.ctx)
	if err != nil {
		return err
	}
	defer root.End(r)
	defer w.units.Add(1)
	return f(r)
}

func (w *world) attach(name string, readOnly bool) (*graph.Root, error) {
	n := w.x.Graph.Node(name)
	if n == nil {
		return nil, fmt.Errorf("there is no node %s", name)
	}
	return w.x.AttachRoot(w.ctx, n, readOnly)
}

// with calls f with a root on a node.
func (w *world) with(name string, readOnly bool, f func(root *graph.Root)) {
	root := trial.Get(w.attach(name, readOnly))
	err := trial.Run(func() { f(root) })
	trial.Must(errors.Join(err, w.x.Graph.CloseRoot(w.ctx, root)))
}

// fill writes data, zeroes and compressed clusters.
func (w *world) fill(root *graph.Root, l Layer, shown []byte) (done []span) {
	do := func(f func(r *blk.Req) error) { trial.Must(w.unit(root, f)) }
	for range l.Fill {
		off, n := w.space.place(w.r, 0, int64(len(shown)))
		if n == 0 {
			break
		}
		p, at := shown[off:off+n], w.space.disk(off)
		switch k := w.r.IntN(8); {
		case k == 0:
			clear(p)
			do(func(r *blk.Req) error { return root.Zero(r, at, n, trial.Pick(w.r, 0, blk.MayUnmap)) })
		case k == 1 && !l.Raw && w.space == nil:
			c := int64(l.Cluster)
			off = off / c * c
			q := shown[off:min(off+c, int64(len(shown)))]
			was := slices.Clone(q)
			write(w.r, q)
			done = append(done, span{off, int64(len(q))})
			compressed := func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(q), off, blk.Compressed) }
			if w.unit(root, compressed) != nil {
				copy(q, was) // it has data of its own
			}
		default:
			write(w.r, p)
			do(func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(p), at, 0) })
		}
		done = append(done, span{off, n})
	}
	do(root.Flush)
	return done
}

// place is a part of a disk: short or long, mostly of whole sectors.
func place(r *rand.Rand, size int64) (off, n int64) {
	if size == 0 {
		return 0, 0
	}
	off = r.Int64N(size)
	n = 1 + r.Int64N(min(size, trial.Pick[int64](r, 512, 4096, 65536, 256<<10, 2<<20)))
	if r.IntN(4) != 0 {
		off, n = off/512*512, (n+511)/512*512
	}
	return off, min(n, size-off)
}

// write makes content.
func write(r *rand.Rand, p []byte) {
	k := byte(1 + r.IntN(255))
	for i := range p {
		p[i] = k
		k += 7 | 1
	}
	if trial.One(r, 4) && len(p) > 0 {
		a := r.IntN(len(p))
		clear(p[a:min(len(p), a+8192)])
	}
}

// read is what a node shows, as the model has it.
func (w *world) read(name string) (p []byte) {
	w.with(name, true, func(root *graph.Root) {
		p = make([]byte, w.space.model(root.Size()))
		for off := int64(0); off < int64(len(p)); {
			n := w.space.within(off, min(1<<20, int64(len(p))-off))
			trial.Must(w.unit(root, func(r *blk.Req) error {
				return root.ReadAt(r, blk.Buf(p[off:off+n]), w.space.disk(off), 0)
			}))
			off += n
		}
		if w.space != nil {
			w.zeroBetween(root)
		}
	})
	return p
}

// shows compares what a node shows with want.
func (w *world) shows(name string, want []byte) {
	trial.In(name, func() { trial.Must(trial.Same(w.read(name), want, 0)) })
}

func same(name string, got, want []byte) {
	trial.In(name, func() { trial.Must(trial.Same(got, want, 0)) })
}
