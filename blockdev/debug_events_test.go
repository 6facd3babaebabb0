package blockdev

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestErrorsAtEvents lets a request fail at each event that a qcow2 image announces: what was
// acknowledged is there, and the image is sound.
func TestErrorsAtEvents(t *testing.T) {
	seen := 0
	for _, ev := range types.BlkdebugEventValues {
		if ev == types.BlkdebugEventNone {
			continue
		}
		for _, kind := range []string{"read", "write", "flush"} {
			x := &eventImage{T: t, event: string(ev), kind: kind, size: 1 << 20, cluster: 64 << 10}
			if x.open() {
				x.use()
				x.end()
			}
			if x.failed {
				seen++
			}
		}
	}
	if seen < 25 {
		t.Errorf("only %d of the rules had an effect", seen)
	}
}

// TestErrorsWhileGrowing is the same of an image of small clusters, whose tables grow and shrink.
func TestErrorsWhileGrowing(t *testing.T) {
	// The events of tables that are replaced; whether a write follows.
	for ev, writes := range map[types.BlkdebugEvent]bool{
		types.BlkdebugEventL1GrowAllocTable:         true,
		types.BlkdebugEventL1GrowWriteTable:         true,
		types.BlkdebugEventL1GrowActivateTable:      true,
		types.BlkdebugEventL1ShrinkWriteTable:       true,
		types.BlkdebugEventL1ShrinkFreeL2Clusters:   false,
		types.BlkdebugEventRefblockAlloc:            false,
		types.BlkdebugEventRefblockAllocHookup:      true,
		types.BlkdebugEventReftableGrow:             false,
		types.BlkdebugEventRefblockAllocWriteBlocks: true,
		types.BlkdebugEventRefblockAllocWriteTable:  true,
		types.BlkdebugEventRefblockAllocSwitchTable: true,
		types.BlkdebugEventRefblockUpdatePart:       true,
		types.BlkdebugEventClusterFree:              false,
	} {
		for _, kind := range []string{"write", "flush"} {
			x := &eventImage{T: t, event: string(ev), kind: kind, size: 4 << 20, cluster: 512}
			if x.open() {
				x.grow()
				x.end()
			}
			if !x.failed && writes && kind == "write" {
				t.Errorf("%s: nothing failed", ev)
			}
		}
	}
}

const eventBlock = 4096

// eventImage is a qcow2 image with a backing file, whose requests of a kind fail once at an event,
// and what it should hold.
type eventImage struct {
	*testing.T
	event, kind string
	size        int
	cluster     uint64
	failed      bool

	file  string
	model []byte       // nil: the image was not opened
	maybe map[int]bool // blocks that a failed request may have changed
	node  *graph.Node
	root  *graph.Root
}

// open tells whether that worked. At the end of the test the image is checked and compared.
func (x *eventImage) open() bool {
	dir := x.TempDir()
	base := filepath.Join(dir, "base.qcow2")
	x.file, x.maybe = filepath.Join(dir, "a.qcow2"), map[int]bool{}
	create(x, base, "", "")
	createWith(x, x.file, func(o *types.BlockdevCreateOptionsQcow2) {
		format := types.BlockdevDriverQcow2
		o.Size, o.ClusterSize, o.BackingFile, o.BackingFmt = uint64(x.size), &x.cluster, &base, &format
	})
	x.Cleanup(x.check) // runs after the graph was closed
	m := newManager(x, Config{})
	err := add(x, m, fmt.Sprintf(`{'driver': 'qcow2', 'node-name': 'q', 'discard': 'unmap', 'file': {'driver': 'blkdebug', 'node-name': 'd',
		'image': {'driver': 'file', 'filename': '%s'}, 'inject-error': [{'event': '%s', 'iotype': '%s', 'once': true, 'immediately': true}]}}`, x.file, x.event, x.kind))
	if err != nil {
		x.failed = true
		return false
	}
	x.node = m.Graph().Node("q")
	x.root = drivertest.AddRoot(x.T, m.Graph(), x.node, drivertest.Writer)
	x.model = make([]byte, x.size)
	return true
}

// check looks at what is on disk, with qemu-img.
func (x *eventImage) check() {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return
	}
	out, err := exec.Command("qemu-img", "check", x.file).CombinedOutput()
	if e, ok := err.(*exec.ExitError); err != nil && !(ok && e.ExitCode() == 3) {
		x.Errorf("%s, %s: %v\n%s", x.event, x.kind, err, out)
	}
	if x.model == nil {
		return
	}
	name := x.file + ".raw"
	if out, err := exec.Command("qemu-img", "convert", "-O", "raw", x.file, name).CombinedOutput(); err != nil {
		x.Fatalf("%s, %s: %v\n%s", x.event, x.kind, err, out)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		x.Fatal(err)
	}
	x.compare(got, "on disk")
	os.Remove(name)
	os.Remove(x.file)
}

func (x *eventImage) compare(got []byte, where string) {
	if len(got) != len(x.model) {
		x.Errorf("%s, %s, %s: %d bytes, want %d", x.event, x.kind, where, len(got), len(x.model))
		return
	}
	for b := range len(got) / eventBlock {
		if !x.maybe[b] && !bytes.Equal(got[b*eventBlock:(b+1)*eventBlock], x.model[b*eventBlock:(b+1)*eventBlock]) {
			x.Errorf("%s, %s, %s: block %d has %d, want %d", x.event, x.kind, where, b, got[b*eventBlock], x.model[b*eventBlock])
		}
	}
}

// do makes a request that concerns k blocks from the first on; then is what it changes if it
// succeeds.
func (x *eventImage) do(first, k int, f func(r *blk.Req) error, then func()) error {
	r, err := x.root.Begin(context.Background())
	if err != nil {
		x.Fatal(err)
	}
	defer x.root.End(r)
	err = f(r)
	for b := first; b < first+k; b++ {
		if err != nil {
			x.maybe[b] = true
		} else {
			delete(x.maybe, b)
		}
	}
	if err == nil {
		then()
	} else {
		x.failed = true
	}
	return err
}

func (x *eventImage) write(first, k int, c byte, f blk.Flags) {
	p := bytes.Repeat([]byte{c}, k*eventBlock)
	_ = x.do(first, k, func(r *blk.Req) error { return x.root.Edge().WriteAt(r, blk.Buf(p), int64(first*eventBlock), f) },
		func() { copy(x.model[first*eventBlock:], p) })
}

func (x *eventImage) clear(first, k int, f func(r *blk.Req, off, n int64) error) {
	_ = x.do(first, k, func(r *blk.Req) error { return f(r, int64(first*eventBlock), int64(k*eventBlock)) },
		func() { clear(x.model[first*eventBlock : (first+k)*eventBlock]) })
}

func (x *eventImage) flush() {
	_ = x.do(0, 0, func(r *blk.Req) error { return x.root.Edge().Flush(r) }, func() {})
}

// use writes, compresses, discards, zeroes, takes a snapshot and reads.
func (x *eventImage) use() {
	for round := range 3 {
		c := byte(round + 1)
		x.write(1, 3, c, 0)
		x.write(32, 16, c, blk.Compressed)
		x.write(64+round*16, 1, c, 0)
		x.flush()
		if s, ok := x.node.Driver().(graph.InternalSnapshotter); ok && round == 1 {
			_ = x.do(0, 0, func(r *blk.Req) error { _, err := s.CreateSnapshot(r, "s", started, 0); return err }, func() {})
		}
		x.clear(32, 16, func(r *blk.Req, off, n int64) error { return x.root.Edge().Discard(r, off, n) })
		x.clear(128, 16, func(r *blk.Req, off, n int64) error { return x.root.Edge().Zero(r, off, n, 0) })
		for b := 0; b < x.size/eventBlock; b += 16 {
			p := make([]byte, 16*eventBlock)
			read := func(r *blk.Req) error { return x.root.Edge().ReadAt(r, blk.Buf(p), int64(b*eventBlock), 0) }
			_ = x.do(0, 0, read, func() {})
		}
		x.flush()
	}
}

// grow fills the image while it becomes larger, and makes it smaller again.
func (x *eventImage) grow() {
	const step = 64
	at := 0
	for _, size := range []int{x.size, 3 * x.size, 2 * x.size} {
		if size != len(x.model) {
			if err := x.root.Resize(context.Background(), int64(size), true, blk.PreallocOff); err != nil {
				x.failed = true
				if x.root.Resize(context.Background(), int64(size), true, blk.PreallocOff) != nil {
					break
				}
			}
			now := make([]byte, size)
			copy(now, x.model)
			x.model = now
		}
		for ; (at+step)*eventBlock <= size; at += step {
			x.write(at, step, byte(at/step+1), 0)
		}
		x.flush()
	}
	x.clear(0, 512, func(r *blk.Req, off, n int64) error { return x.root.Edge().Discard(r, off, n) })
	x.flush()
}

// end reads all; the rule may still be there.
func (x *eventImage) end() {
	if q, ok := x.node.Driver().(*qcow2.Driver); ok && q.Ejected() {
		x.Errorf("%s, %s: the image was given up", x.event, x.kind)
	}
	got := make([]byte, len(x.model))
	for range 2 {
		if x.do(0, 0, func(r *blk.Req) error { return x.root.Edge().ReadAt(r, blk.Buf(got), 0, 0) }, func() {}) == nil {
			break
		}
	}
	x.compare(got, "read")
	x.flush()
}
