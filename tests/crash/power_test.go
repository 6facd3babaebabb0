package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// write is one unit of work.
func write(ctx context.Context, root *graph.Root, p []byte, off int64) error {
	return unit(ctx, root, func(r *blk.Req) error { return root.WriteAt(r, blk.Buf(p), off, 0) })
}

func read(ctx context.Context, root *graph.Root, p []byte, off int64) error {
	return unit(ctx, root, func(r *blk.Req) error { return root.ReadAt(r, blk.Buf(p), off, 0) })
}

func unit(ctx context.Context, root *graph.Root, f func(r *blk.Req) error) error {
	r, err := root.Begin(ctx)
	if err != nil {
		return err
	}
	defer root.End(r)
	return f(r)
}

// moment is what a power failure leaves, beside what may be in it.
type moment struct {
	op   int
	seed uint64
	file *drivertest.MemFile
	l    *ledger
}

type powerCase struct {
	cs       uint64
	lazy, v2 bool
	bits     int64
}

// TestPower lets power fail while four guests write to an overlay in parallel and a job streams
// into it: after random operations of the file below.
func TestPower(t *testing.T) {
	for i, c := range []powerCase{
		{cs: 512, bits: 16}, {cs: 4096, bits: 16}, {cs: 65536, bits: 16}, {cs: 4096, bits: 64}, {cs: 1024, bits: 1},
		{cs: 4096, bits: 16, v2: true}, {cs: 4096, bits: 16, lazy: true},
	} {
		seed := *flagSeed + uint64(i)
		t.Run(fmt.Sprintf("%+v/seed=%d", c, seed), func(t *testing.T) {
			t.Parallel()
			power(t, c, seed)
		})
	}
}

const powerSectors = 3000

func power(t *testing.T, c powerCase, seed uint64) {
	ctx := context.Background()
	rnd := rand.New(rand.NewPCG(seed, 5))
	x := rig.New("")
	base := make([]byte, powerSectors*sector)
	for i := range powerSectors {
		stamp(base[i*sector:], 1<<63|uint64(i))
	}
	x.Store.Put("base", drivertest.MemFileOf(base))
	x.Store.Put("top", drivertest.NewMemFile(0))
	o := types.BlockdevCreateOptionsQcow2{Size: uint64(len(base)), ClusterSize: &c.cs, LazyRefcounts: &c.lazy,
		BackingFile: rig.Ptr("base"), BackingFmt: rig.Ptr(types.BlockdevDriverRaw)}
	if c.v2 {
		o.Version = rig.Ptr(types.BlockdevQcow2VersionV2)
	} else {
		o.RefcountBits = &c.bits
	}
	if err := x.CreateQcow2(ctx, "top", o); err != nil {
		t.Fatal(err)
	}
	f := drivertest.CrashFileOf(x.Store.Get("top"))
	l := newLedger(powerSectors, func(i int) uint64 { return 1<<63 | uint64(i) })
	var moments []moment // appended to under the file's lock
	crash := rand.New(rand.NewPCG(seed, 6))
	f.After(func(i int) {
		if len(moments) < 80 && crash.IntN(6) == 0 {
			s := crash.Uint64()
			moments = append(moments, moment{i, s, f.CrashLocked(s), l.snapshot()})
		}
	})
	if err := load(x, l, rnd); err != nil {
		t.Fatal(err)
	}
	f.After(nil)
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	leaks := 0
	for _, m := range moments {
		n, err := m.verify(x.Store.Get("base"), c.lazy)
		if err != nil {
			t.Fatalf("after operation %d, crash %d: %v", m.op, m.seed, err)
		}
		leaks += n
	}
	if len(moments) < 20 {
		t.Fatalf("only %d power failures", len(moments))
	}
	t.Logf("%d power failures, %d leaked clusters", len(moments), leaks)
}

func openTop(ctx context.Context, x *rig.Rig, readOnly bool) (*graph.Root, error) {
	o := &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: rig.Ptr("top"), ReadOnly: &readOnly,
		Discard: rig.Ptr(types.BlockdevDiscardOptionsUnmap),
		U: &types.BlockdevOptionsQcow2{File: x.File("top"),
			L2CacheSize: rig.Ptr(int64(1)), L2CacheEntrySize: rig.Ptr(int64(512))}}
	if err := x.Nodes.Add(ctx, o); err != nil {
		return nil, err
	}
	return x.AttachRoot(ctx, x.Graph.Node("top"), readOnly)
}

// load is four guests and a job.
func load(x *rig.Rig, l *ledger, rnd *rand.Rand) error {
	ctx := context.Background()
	root, err := openTop(ctx, x, false)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make([]error, clients)
	for i := range clients {
		r := rand.New(rand.NewPCG(rnd.Uint64(), 7))
		wg.Go(func() { errs[i] = guest(root, l, i*powerSectors/clients, powerSectors/clients, r) })
	}
	// Nothing stays but what a guest's first writes have done.
	err = x.BlockJob.BlockStream(ctx, &types.BlockStreamArgs{JobID: rig.Ptr("j"), Device: "top", AutoDismiss: rig.Ptr(false)})
	if err == nil {
		j := x.Jobs.Get("j")
		<-j.Finished()
		err = j.Err()
	}
	wg.Wait()
	return errors.Join(append(errs, err, x.Graph.CloseRoot(ctx, root))...)
}

// guest writes to its part, of odd length, so that clusters are shared.
func guest(root *graph.Root, l *ledger, lo, n int, r *rand.Rand) error {
	ctx := context.Background()
	for range 60 {
		first := lo + r.IntN(n)
		k := min(1+r.IntN(20), lo+n-first)
		off, size := int64(first*sector), int64(k*sector)
		var err error
		switch r.IntN(10) {
		case 0:
			l.zero(first, k)
			err = unit(ctx, root, func(q *blk.Req) error { return root.Zero(q, off, size, blk.MayUnmap) })
		case 1, 2:
			if err = unit(ctx, root, root.Flush); err == nil {
				l.flushed(lo, n)
			}
		case 3:
			p := l.mark(first, k)
			err = unit(ctx, root, func(q *blk.Req) error { return root.WriteAt(q, blk.Buf(p), off, blk.FUA) })
			if err == nil {
				l.flushed(first, k)
			}
		default:
			err = write(ctx, root, l.mark(first, k), off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// verify opens what a power failure has left.
func (m *moment) verify(base *drivertest.MemFile, lazy bool) (leaks int, err error) {
	ctx := context.Background()
	x := rig.New("")
	defer func() { err = errors.Join(err, x.Close()) }()
	x.Store.Put("base", base)
	x.Store.Put("top", m.file)
	if !lazy {
		res, err := x.Check(ctx, "top")
		if err != nil {
			return 0, err
		}
		if res.Corruptions+res.Errors > 0 {
			return 0, fmt.Errorf("check: %+v", *res)
		}
	}
	root, err := openTop(ctx, x, false)
	if err != nil {
		return 0, err
	}
	p := make([]byte, powerSectors*sector)
	err = unit(ctx, root, func(r *blk.Req) error { return root.ReadAt(r, blk.Buf(p), 0, 0) })
	if err == nil {
		err = m.l.verify(p)
	}
	if err == nil {
		err = write(ctx, root, p[:4096], 1024)
	}
	if err = errors.Join(err, x.Graph.CloseRoot(ctx, root), x.Nodes.Del(ctx, "top")); err != nil {
		return 0, err
	}
	res, err := x.Check(ctx, "top")
	if err == nil && res.Corruptions+res.Errors > 0 {
		err = fmt.Errorf("check after going on: %+v", *res)
	}
	return res.Leaks, err
}
