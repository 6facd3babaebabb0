package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// Config says how Run gets at the driver under test.
type Config struct {
	// Open builds a fresh node of the driver, of at least size bytes, in g. readOnly: the node is to
	// be read-only.
	Open func(t *testing.T, g *graph.Graph, size int64, readOnly bool) *graph.Node
	// ReadOnly: the driver does not write. All nodes are opened read-only, and what writes is left
	// out of the tests.
	ReadOnly bool
	// Content fills b with what a fresh node has from off on, in bytes; nil: zeroes. Layers show the
	// same.
	Content func(b []byte, off int64)
	// Size of the nodes; default 1 MiB + 512 bytes.
	Size int64
	// Layers are passed-through formats (raw) that the driver is tested under as well, each alone.
	Layers []Layer
	// NoContent: what is written is not kept; contents are not compared.
	NoContent bool
	// Noise: what a resize adds is not zeroes.
	Noise bool
	// Fixed: the size cannot be changed.
	Fixed bool
	// Check is called after each test with the graph still open and nothing in flight, to check the
	// image in full.
	Check func(t *testing.T, n *graph.Node)
	// Steps of the random test; default 250.
	Steps int
}

// Layer is something to put on top of a node.
type Layer struct {
	Name    string
	Def     *driver.Any
	Options any
}

// rig is one test's graph.
type rig struct {
	c    *Config
	node *graph.Node // top
	root *graph.Root
	req  *blk.Req
}

// Run checks that a driver keeps the contract of package graph: contents against a byte slice,
// concurrency, status, resizing, bounds, read-only nodes, requests that must not wait, mapping and
// copying.
func Run(t *testing.T, c Config) {
	if c.Size == 0 {
		c.Size = 1<<20 + 512
	}
	if c.Steps == 0 {
		c.Steps = 250
	}
	stacks := []*Layer{nil}
	for i := range c.Layers {
		stacks = append(stacks, &c.Layers[i])
	}
	for _, layer := range stacks {
		name := "bare"
		if layer != nil {
			name = layer.Name
		}
		t.Run(name, func(t *testing.T) {
			for _, test := range tests {
				if c.ReadOnly && test.writes {
					continue
				}
				t.Run(test.name, func(t *testing.T) {
					x := newRig(t, &c, layer, c.ReadOnly)
					test.f(t, x)
					if c.Check != nil && !t.Failed() {
						x.must(t, "flush", x.root.Flush(x.req))
						c.Check(t, x.node)
					}
				})
			}
			t.Run("readonly", func(t *testing.T) { testReadOnly(t, newRig(t, &c, layer, true)) })
		})
	}
}

var tests = []struct {
	name   string
	writes bool // always
	f      func(*testing.T, *rig)
}{
	{"model", false, testModel},
	{"disjoint", true, testDisjoint},
	{"overlapping", false, testOverlapping},
	{"status", false, testStatus},
	{"bounds", false, testBounds},
	{"resize", true, testResize},
	{"nowait", false, testNoWait},
	{"map", false, testMap},
	{"copy", true, testCopy},
}

func newRig(t *testing.T, c *Config, layer *Layer, readOnly bool) *rig {
	t.Helper()
	g := NewGraph(t)
	n := c.Open(t, g, c.Size, readOnly)
	if layer != nil {
		n = MustBuild(t, g, Spec{
			Options: graph.Options{
				Name: "layer", Kind: layer.Def.Kind, DriverName: string(layer.Def.Name), ReadOnly: readOnly,
			},
			Children: []Child{{"file", layer.Def.Children(layer.Options)[0].Role, n}},
			Open:     layer.Def.With(layer.Options),
		})
	}
	claim := perm.Claim{Need: perm.ConsistentRead | perm.Write | perm.Resize, Share: perm.All}
	if readOnly {
		claim = Reader
	}
	x := &rig{c: c, node: n, root: AddRoot(t, g, n, claim)}
	r, err := x.root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	x.req = r
	t.Cleanup(func() { x.root.End(r) })
	return x
}

func (x *rig) read(t *testing.T, off, n int64) []byte {
	t.Helper()
	b := bytes.Repeat([]byte{0xEE}, int(n))
	if err := x.root.ReadAt(x.req, blk.Buf(b), off, 0); err != nil {
		t.Fatalf("read [%d, +%d): %v", off, n, err)
	}
	return b
}

// fresh is what [0, n) has at first.
func (x *rig) fresh(n int64) []byte {
	b := make([]byte, n)
	if x.c.Content != nil {
		x.c.Content(b, 0)
	}
	return b
}

// fill writes b at off unless the driver only reads, when what is there is read into b.
func (x *rig) fill(t *testing.T, b []byte, off int64) {
	t.Helper()
	if x.c.ReadOnly {
		copy(b, x.read(t, off, int64(len(b))))
		return
	}
	x.must(t, "write", x.root.WriteAt(x.req, blk.Buf(b), off, 0))
}

func (x *rig) must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func (x *rig) same(t *testing.T, what string, off int64, got, want []byte) {
	t.Helper()
	if x.c.NoContent || bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, off+int64(i), got[i], want[i])
		}
	}
}

// pieces cuts b at random into a Vec of up to three buffers.
func pieces(rng *rand.Rand, b []byte) blk.Vec {
	if len(b) < 3 || rng.IntN(3) > 0 {
		return blk.Buf(b)
	}
	i := rng.IntN(len(b))
	j := i + rng.IntN(len(b)-i)
	return blk.Bufs([][]byte{b[:i], b[i:j], b[j:]})
}

func randomRange(rng *rand.Rand, size int64) (off, n int64) {
	switch rng.IntN(4) {
	case 0: // whole blocks
		off = rng.Int64N(size/4096) * 4096
		n = (1 + rng.Int64N(16)) * 4096
	case 1: // sectors
		off = rng.Int64N(size/512) * 512
		n = (1 + rng.Int64N(16)) * 512
	case 2: // small and odd
		off, n = rng.Int64N(size), 1+rng.Int64N(700)
	default: // large and odd
		off, n = rng.Int64N(size), 1+rng.Int64N(200<<10)
	}
	return off, min(n, size-off)
}

// testModel compares random requests with a byte slice.
func testModel(t *testing.T, x *rig) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	size := x.root.Size()
	model := x.fresh(size)
	for i := range x.c.Steps {
		off, n := randomRange(rng, size)
		at := fmt.Sprintf("step %d at [%d, +%d)", i, off, n)
		op := rng.IntN(12)
		if x.c.ReadOnly {
			op = 8 + op%4
		}
		switch op {
		case 0, 1, 2, 3, 4:
			b := bytes.Repeat([]byte{byte(rng.IntN(256))}, int(n))
			f := blk.Flags(0)
			if op == 4 {
				f = blk.FUA
			}
			x.must(t, "write "+at, x.root.WriteAt(x.req, pieces(rng, b), off, f))
			copy(model[off:], b)
		case 5, 6:
			f := []blk.Flags{0, blk.MayUnmap, blk.FUA, blk.NoFallback | blk.MayUnmap}[rng.IntN(4)]
			err := x.root.Zero(x.req, off, n, f)
			if f&blk.NoFallback != 0 && errors.Is(err, blk.ErrNotSupported) {
				break
			}
			x.must(t, "zero "+at, err)
			clear(model[off : off+n])
		case 7:
			x.must(t, "discard "+at, x.root.Discard(x.req, off, n))
			// What was discarded may read as it was or as zeroes.
			got := x.read(t, off, n)
			for j := range got {
				if got[j] == 0 {
					model[off+int64(j)] = 0
				}
			}
			x.same(t, "after discard "+at, off, got, model[off:off+n])
		case 8:
			x.must(t, "flush", x.root.Flush(x.req))
		case 9:
			e, err := x.root.Status(x.req, off, n)
			x.must(t, "status "+at, err)
			if e.N <= 0 || e.N > n || e.EOF != (off+e.N == size) {
				t.Fatalf("status %s: %+v", at, e)
			}
			if e.Zero && !x.c.NoContent && !blk.IsZero(model[off:off+e.N]) {
				t.Fatalf("status %s: zeroes where there is data: %+v", at, e)
			}
		default:
			b := make([]byte, n)
			x.must(t, "read "+at, x.root.ReadAt(x.req, pieces(rng, b), off, 0))
			x.same(t, "read "+at, off, b, model[off:off+n])
		}
	}
	x.same(t, "at the end", 0, x.read(t, 0, size), model)
}

// parallel runs f in k units of work at once.
func (x *rig) parallel(t *testing.T, k int, f func(i int, r *blk.Req) error) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, k)
	for i := range k {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := x.root.Begin(context.Background())
			if err != nil {
				errs[i] = err
				return
			}
			defer x.root.End(r)
			errs[i] = f(i, r)
		}()
	}
	wg.Wait()
	x.must(t, "parallel requests", errors.Join(errs...))
}

// testDisjoint lets neighbours write stripes that share blocks: none may lose another's bytes.
func testDisjoint(t *testing.T, x *rig) {
	const stripe, writers = 300, 8
	size := min(x.root.Size(), 128<<10)
	want := make([]byte, size)
	for at := int64(0); at < size; at += stripe {
		w := byte(at / stripe % writers)
		for i := at; i < min(at+stripe, size); i++ {
			want[i] = w + 1
		}
	}
	x.parallel(t, writers, func(i int, r *blk.Req) error {
		for at := int64(i) * stripe; at < size; at += writers * stripe {
			n := min(stripe, size-at)
			if err := x.root.WriteAt(r, blk.Buf(want[at:at+n]), at, 0); err != nil {
				return err
			}
		}
		return x.root.Flush(r)
	})
	x.same(t, "stripes", 0, x.read(t, 0, size), want)
}

// testOverlapping lets writers fight for the same blocks: each byte is from one of them, and
// nothing else suffers. Of a driver that only reads many read, and read what is there.
func testOverlapping(t *testing.T, x *rig) {
	const writers, rounds = 6, 20
	size := min(x.root.Size(), 256<<10)
	fresh := x.fresh(size)
	guard := bytes.Repeat([]byte{0xAA}, 4096)
	x.fill(t, guard, 0)
	x.parallel(t, writers, func(i int, r *blk.Req) error {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		b := make([]byte, 32<<10)
		for range rounds {
			off := 4096 + rng.Int64N(size-4096)
			n := 1 + rng.Int64N(min(int64(len(b)), size-off))
			var err error
			switch op := rng.IntN(4); {
			case x.c.ReadOnly:
				err = x.root.ReadAt(r, blk.Buf(b[:n]), off, 0)
				if err == nil && !x.c.NoContent && !bytes.Equal(b[:n], fresh[off:off+n]) {
					err = fmt.Errorf("wrong data in [%d, +%d)", off, n)
				}
			case op == 0:
				err = x.root.Zero(r, off, n, blk.MayUnmap)
			case op == 1:
				err = x.root.ReadAt(r, blk.Buf(b[:n]), off, 0)
			default:
				for j := range n {
					b[j] = byte(i + 1)
				}
				err = x.root.WriteAt(r, blk.Buf(b[:n]), off, 0)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if x.c.NoContent || x.c.ReadOnly {
		return
	}
	got := x.read(t, 0, size)
	x.same(t, "guard", 0, got[:4096], guard)
	for i, c := range got[4096:] {
		if c > writers && c != fresh[4096+i] {
			t.Fatalf("byte %d is %#x, which nobody wrote", i+4096, c)
		}
	}
}

// testStatus walks the whole node: extents cover it, and zero means zeroes.
func testStatus(t *testing.T, x *rig) {
	size := x.root.Size()
	if !x.c.ReadOnly {
		x.must(t, "write", x.root.WriteAt(x.req, blk.Buf(bytes.Repeat([]byte{1}, 70000)), 100000, 0))
		x.must(t, "zero", x.root.Zero(x.req, 120000, 30000, blk.MayUnmap))
	}
	for _, ask := range []func(off, n int64) (blk.Extent, error){
		func(off, n int64) (blk.Extent, error) { return x.root.Status(x.req, off, n) },
		func(off, n int64) (blk.Extent, error) { return x.root.StatusAbove(x.req, nil, false, off, n) },
	} {
		for off := int64(0); off < size; {
			e, err := ask(off, size-off)
			x.must(t, "status", err)
			if e.N <= 0 || off+e.N > size || e.EOF != (off+e.N == size) {
				t.Fatalf("status at %d: %+v", off, e)
			}
			if e.Zero && !x.c.NoContent && !blk.IsZero(x.read(t, off, e.N)) {
				t.Fatalf("status at %d: %+v, but there is data", off, e)
			}
			if e.Depth > 0 && !e.Allocated {
				t.Fatalf("status at %d: depth without allocation: %+v", off, e)
			}
			off += e.N
		}
		e, err := ask(size, 1)
		if err != nil || e.N != 0 || !e.EOF {
			t.Fatalf("status at the end: %+v, %v", e, err)
		}
	}
}
