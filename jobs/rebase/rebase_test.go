package rebase_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/jobs/blockjob"
	"qblockd/jobs/jobtest"
	"qblockd/jobs/rebase"
	"qblockd/schema/types"
)

const (
	cluster = 64 << 10
	piece   = 16 << 10 // what layers and guests write
)

// world is an image over a chain of two, a possible new backing file beside them, and a guest.
type world struct {
	t     testing.TB
	g     *graph.Graph
	m     *jobs.Manager
	nodes map[string]*graph.Node
	files map[string]*drivertest.Fault // of the image and the new backing file
	crash *drivertest.CrashFile        // what the image lies in
	guest *graph.Root
	want  []byte // what the guest must read
	*jobtest.Events
}

// sizes are those of the layers, in pieces.
type sizes struct{ deep, old, image, base int }

var someSizes = []sizes{
	{64, 64, 64, 64}, {80, 30, 64, 50}, {30, 64, 62, 90}, {64, 80, 64, 11}, {10, 10, 50, 50}, {1, 3, 333, 400},
}

func newWorld(t testing.TB, s sizes, seed uint64) *world {
	t.Helper()
	g, _ := drivertest.NewGraphSink(t)
	w := &world{
		t: t, g: g, nodes: map[string]*graph.Node{}, files: map[string]*drivertest.Fault{},
		crash: drivertest.NewCrashFile(0), Events: jobtest.NewEvents(),
	}
	w.m = jobs.NewManager(w, nil)
	rnd := rand.New(rand.NewPCG(seed, 1))
	layer := func(name string, pieces int, below string, filled int) {
		var file graph.Driver = drivertest.NewMemFile(0)
		if name == "image" {
			file = w.crash
		}
		if name == "image" || name == "base" {
			w.files[name] = drivertest.NewFault(file)
			file = w.files[name]
		}
		w.nodes[name] = jobtest.Layer(t, g, name, file, int64(pieces)*piece, w.nodes[below])
		jobtest.Visit(t, w.nodes[name], func(root *graph.Root) (err error) {
			for i := range pieces {
				if rnd.IntN(filled) == 0 {
					err = errors.Join(err, change(rnd, root, i, 1+rnd.IntN(3), nil))
				}
			}
			return err
		})
	}
	layer("deep", s.deep, "", 2)
	layer("old", s.old, "deep", 4)
	layer("image", s.image, "old", 6)
	layer("base", s.base, "", 3)
	w.guest = drivertest.AddRoot(t, g, w.nodes["image"], drivertest.Writer)
	w.want = w.read()
	return w
}

// change does something to piece i as a guest does; want, if not nil, is what it reads after that.
func change(rnd *rand.Rand, root *graph.Root, i, content int, want []byte) (err error) {
	off := int64(i) * piece
	switch rnd.IntN(6) {
	case 0:
		content, err = 0, jobtest.Zero(root, off, piece)
	case 1:
		content = -1
		if off%cluster == 0 && off+cluster <= root.Node().Size() {
			content, err = 0, jobtest.Discard(root, off, cluster)
			off, i = off/cluster*cluster, -1
		}
	default:
		err = jobtest.Write(root, off, bytes.Repeat([]byte{byte(content)}, piece))
	}
	if want != nil && content >= 0 {
		n := piece
		if i < 0 {
			n = cluster
		}
		copy(want[off:], bytes.Repeat([]byte{byte(content)}, n))
	}
	return err
}

func (w *world) read() []byte { return read(w.t, w.guest) }

func read(t testing.TB, root *graph.Root) []byte {
	t.Helper()
	p := make([]byte, root.Node().Size())
	if err := jobtest.Read(root, 0, p); err != nil {
		t.Error(err)
	}
	return p
}

// start starts a job that makes base, "" for none, the backing file of the image, by the name
// "new".
func (w *world) start(base string, speed int64) *jobs.Job {
	w.t.Helper()
	a := types.XQblockdRebaseArgs{JobID: new("j"), Device: "image", AutoDismiss: new(false), Speed: &speed}
	if base != "" {
		a.BaseNode, a.BackingFile = &base, new("new")
	}
	j, err := rebase.FromArgs(blockdev.New(w.g, blockdev.Config{Drivers: drivers.All}), &a)
	if err != nil {
		w.t.Fatal(err)
	}
	release, err := blockjob.Start(context.Background(), w.g, w.m, j)
	if err != nil {
		w.t.Fatal(err)
	}
	release()
	return w.m.Get("j")
}

func (w *world) finish(j *jobs.Job) error {
	w.t.Helper()
	return jobtest.Finish(w.t, j, w.files["image"], w.files["base"])
}

// rebased requires that the image lies over base and reads as before.
func (w *world) rebased(base string) {
	w.t.Helper()
	image := w.nodes["image"]
	name, format := image.Driver().(graph.Backed).BackingFile()
	want, over := "new qcow2", graph.Now.Below(image)
	if base == "" {
		want = " "
	}
	if got := name + " " + format; got != want || over != w.nodes[base] {
		w.t.Errorf("the image is over %q, node %v", got, over)
	}
	w.same()
	for op := graph.OpBackupSource; op <= graph.OpReplace; op++ {
		if err := image.Blocked(op); err != nil {
			w.t.Error(err)
		}
	}
}

func (w *world) same() {
	w.t.Helper()
	got := w.read()
	for i := range got {
		if got[i] != w.want[i] {
			w.t.Fatalf("byte %d (piece %d, cluster %d) is %d, not %d", i, i/piece, i/cluster, got[i], w.want[i])
		}
	}
}

// targets are the new backing files: one beside the chain, two of it, none.
var targets = []string{"base", "deep", "old", ""}

// TestRebase is every target, with layers of many lengths, under a guest that writes.
func TestRebase(t *testing.T) {
	for _, s := range someSizes {
		for _, base := range targets {
			for _, writes := range []bool{false, true} {
				t.Run(fmt.Sprint(s, base, writes), func(t *testing.T) {
					w := newWorld(t, s, 7)
					over, began := make(chan struct{}), make(chan struct{})
					var wg sync.WaitGroup
					if writes {
						wg.Go(func() {
							rnd := rand.New(rand.NewPCG(3, 4))
							for i := 0; ; i++ {
								select {
								case <-over:
									return
								default:
								}
								if err := change(rnd, w.guest, rnd.IntN(s.image), 100+i%100, w.want); err != nil {
									t.Error(err)
								}
								if i == 1 {
									close(began)
								}
							}
						})
						<-began
					}
					err := w.finish(w.start(base, 0))
					close(over)
					wg.Wait()
					if err != nil {
						t.Fatal(err)
					}
					w.rebased(base)
				})
			}
		}
	}
}

// TestNothingMore: what is the same below is not copied.
func TestNothingMore(t *testing.T) {
	s := sizes{64, 64, 64, 64}
	w := newWorld(t, s, 1)
	p := read(t, drivertest.AddRoot(t, w.g, w.nodes["old"], drivertest.Reader))
	p[40*piece]++
	jobtest.Visit(t, w.nodes["base"], func(root *graph.Root) error {
		return jobtest.Write(root, 0, p)
	})
	had := w.crash.Size()
	if err := w.finish(w.start("base", 0)); err != nil {
		t.Fatal(err)
	}
	w.rebased("base")
	if more := w.crash.Size() - had; more > cluster {
		t.Errorf("%d bytes were written for a byte that differs", more)
	}
}

// TestFaults fails the i-th call to a file, for every i: the image is what it was, or, if only the
// end of the job's own doing failed, reads as before in any case.
func TestFaults(t *testing.T) {
	for _, file := range []string{"image", "base"} {
		for i := 0; ; i++ {
			w := newWorld(t, sizes{30, 20, 24, 40}, 5)
			before := jobtest.Look(w.g)
			f := w.files[file]
			f.Inject(drivertest.Rule{Skip: i, Count: 1})
			err := w.finish(w.start("base", 0))
			if err == nil {
				w.rebased("base")
				if f.Failed() == 0 {
					if i < 3 {
						t.Errorf("%s: only %d calls", file, i)
					}
					break
				}
				continue
			}
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("%s, call %d: %v", file, i, err)
			}
			if now := jobtest.Look(w.g); now != before {
				t.Errorf("%s, call %d: the graph is\n%s, it was\n%s", file, i, now, before)
			}
			w.same()
		}
	}
}

// TestCancel: a job that is cancelled leaves the image as it was, and readable.
func TestCancel(t *testing.T) {
	w := newWorld(t, someSizes[0], 5)
	before := jobtest.Look(w.g)
	j := w.start("base", 1)
	if err := j.Cancel(true); err != nil {
		t.Fatal(err)
	}
	if err := w.finish(j); !errors.Is(err, syscall.ECANCELED) {
		t.Errorf("outcome: %v", err)
	}
	if now := jobtest.Look(w.g); now != before {
		t.Errorf("the graph is\n%s, it was\n%s", now, before)
	}
	w.same()
}

// TestCrash: after a power failure at any point the image reads as before from the backing file
// that its header names.
func TestCrash(t *testing.T) {
	for _, base := range []string{"base", "deep"} {
		w := newWorld(t, sizes{60, 20, 64, 90}, 9)
		if err := w.nodes["image"].IO().Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		var left []*drivertest.MemFile
		w.crash.After(func(i int) {
			left = append(left, w.crash.CrashLocked(uint64(i)), w.crash.CrashLocked(uint64(i+1000)))
		})
		if err := w.finish(w.start(base, 0)); err != nil {
			t.Fatal(err)
		}
		w.crash.After(nil)
		named := map[string]int{}
		for i, f := range left {
			named[w.reopened(fmt.Sprint("crash", i), f, base)]++
		}
		if named["new"] == 0 || named["old"] < 10 {
			t.Errorf("after crashes headers name %v", named)
		}
	}
}

// reopened opens an image again, over what its header names, and requires that it reads as before.
func (w *world) reopened(name string, f *drivertest.MemFile, base string) (header string) {
	w.t.Helper()
	open := func(name string, f *drivertest.MemFile, below *graph.Node) *graph.Node {
		kids := []drivertest.Child{drivertest.File(drivertest.AddNode(w.t, w.g, name+"-file", f))}
		if below != nil {
			kids = append(kids, drivertest.Backing(below))
		}
		return drivertest.MustBuild(w.t, w.g, drivertest.Spec{
			Options:  graph.Options{Name: name, DriverName: "qcow2", Kind: graph.Format},
			Children: kids, Open: qcow2.Def.With(&types.BlockdevOptionsQcow2{}),
		})
	}
	header, _ = open(name+"-look", f.Clone(), nil).Driver().(graph.Backed).BackingFile()
	below := w.nodes["old"]
	if header == "new" {
		below = w.nodes[base]
	}
	jobtest.Visit(w.t, open(name, f, below), func(root *graph.Root) error {
		if !bytes.Equal(read(w.t, root), w.want) {
			w.t.Errorf("%s: over %s the image reads as something else", name, header)
		}
		return nil
	})
	return header
}
