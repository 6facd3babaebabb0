package quorum

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestMinorityFails: whatever one of three copies does, forgets, or makes up, the guest sees plain
// bytes. Another copy takes its turn once the bad one was mended.
func TestMinorityFails(t *testing.T) {
	for range 6 {
		seed := rand.Uint64()
		rng := rand.New(rand.NewPCG(seed, 0))
		const size = 3<<20 + 512
		c := newCopies(t, 3, size, types.BlockdevOptionsQuorum{VoteThreshold: 2, RewriteCorrupted: new(true)})
		g, model := c.guest(t), make([]byte, size)
		fail := func(what string, err error) {
			if t.Helper(); err != nil {
				t.Fatalf("seed %d: %s: %v", seed, what, err)
			}
		}
		for range 6 {
			bad := rng.IntN(3)
			for range 60 {
				off := rng.Int64N(size)
				n := 1 + rng.Int64N(min(size-off, []int64{5000, 2 << 20}[rng.IntN(2)]))
				switch rng.IntN(7) {
				case 0:
					c.faults[bad].Inject(drivertest.Rule{
						Ops: drivertest.OpAny, Off: off, N: n, Skip: rng.IntN(2), Count: 1 + rng.IntN(2),
						Err: syscall.Errno(1 + rng.IntN(30)),
					})
				case 1:
					c.files[bad].Poke(off, bytes.Repeat([]byte{byte(rng.IntN(256))}, int(min(n, 3000))))
				case 2, 3:
					b := bytes.Repeat([]byte{byte(rng.IntN(256))}, int(n))
					copy(model[off:], b)
					fail("write", g.WriteAt(g.r, blk.Buf(b), off, []blk.Flags{0, blk.FUA}[rng.IntN(2)]))
				case 4:
					clear(model[off : off+n])
					fail("zero", g.Zero(g.r, off, n, blk.MayUnmap))
				default:
					b, err := g.read(off, n)
					fail("read", err)
					if !bytes.Equal(b, model[off:off+n]) {
						t.Fatalf("seed %d: read [%d, +%d): not what was written", seed, off, n)
					}
				}
			}
			c.faults[bad].Clear()
			b, err := g.read(0, size) // mends
			fail("read", err)
			if !bytes.Equal(b, model) {
				t.Fatalf("seed %d: not what was written", seed)
			}
			fail("flush", g.Flush(g.r))
			c.equal(t)
		}
	}
}

// TestFailAt: whichever I/O of a copy fails first, a threshold of all copies passes it on, the next
// try succeeds, and nothing stays.
func TestFailAt(t *testing.T) {
	for i := range 8 {
		c := newCopies(t, 2, 4<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2})
		g := c.guest(t)
		steps := []func() error{
			func() error { return g.WriteAt(g.r, blk.Buf(bytes.Repeat([]byte{1}, 3<<20)), 100, blk.FUA) },
			func() error { return g.Zero(g.r, 0, 4096, 0) },
			func() error { _, err := g.read(0, 3<<20); return err },
			func() error { return g.Flush(g.r) },
		}
		c.faults[1].FailAt(i, syscall.EIO)
		failed := 0
		for _, step := range steps {
			if err := step(); errors.Is(err, syscall.EIO) {
				failed++
				err = step()
				if err != nil {
					t.Errorf("I/O %d, once more: %v", i, err)
				}
			} else if err != nil {
				t.Errorf("I/O %d: %v", i, err)
			}
		}
		if failed != 1 && c.faults[1].Failed() != 0 {
			t.Errorf("I/O %d: %d steps failed", i, failed)
		}
		c.faults[1].Clear()
		if b, err := g.read(0, 3<<20); err != nil || b[5000] != 1 || b[0] != 0 {
			t.Errorf("I/O %d: %v", i, err)
		}
		c.equal(t)
	}
}

// TestHang: a request waits for the slowest copy, and others elsewhere do not wait for it. When its
// root is torn down the request ends as soon as the copy does, and nobody is told of failures.
func TestHang(t *testing.T) {
	c := newCopies(t, 3, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 1})
	g := c.guest(t)
	in, on := make(chan struct{}), make(chan struct{})
	c.faults[1].Hook(func(op drivertest.Op, off, _ int64) {
		if op == drivertest.OpRead && off == 4096 {
			in <- struct{}{}
			<-on
		}
	})
	ctx, cancel := context.WithCancelCause(context.Background())
	over := errors.New("torn down")
	done := make(chan error, 1)
	r, err := g.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	r.Ctx = ctx
	go func() { done <- g.ReadAt(r, blk.Buf(make([]byte, 4096)), 4096, 0) }()
	<-in
	if _, err := g.read(65536, 4096); err != nil {
		t.Error(err)
	}
	select {
	case err := <-done:
		t.Errorf("a copy hangs: %v", err)
	default:
	}
	cancel(over)
	close(on)
	if err := <-done; !errors.Is(err, over) || c.events() != "" {
		t.Errorf("torn down: %v", err)
	}
	g.End(r)
}

// TestAllocations: what is copied nowhere is allocated nowhere.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools")
	}
	c := newCopies(t, 3, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2})
	g, b := c.guest(t), make([]byte, 128<<10) // which is not tried in line
	for what, f := range map[string]func() error{
		"small read":  func() error { return g.ReadAt(g.r, blk.Buf(b[:4096]), 0, 0) },
		"large read":  func() error { return g.ReadAt(g.r, blk.Buf(b), 0, 0) },
		"small write": func() error { return g.WriteAt(g.r, blk.Buf(b[:4096]), 0, 0) },
		"large write": func() error { return g.WriteAt(g.r, blk.Buf(b), 0, 0) },
	} {
		if n := testing.AllocsPerRun(200, func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		}); n > 1 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}
}
