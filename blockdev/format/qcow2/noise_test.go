package qcow2

import (
	"bytes"
	"context"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// noisy is a file that grows by noise, as one that is encrypted does.
type noisy struct{ *drivertest.MemFile }

func (f noisy) Caps() graph.Caps {
	c := f.MemFile.Caps()
	c.ZeroInit, c.ZeroFlags = false, 0
	return c
}

// fill writes noise to [from, to).
func (f noisy) fill(from, to int64) error {
	if from >= to {
		return nil
	}
	return f.MemFile.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{0xA5}, int(to-from))), from, 0)
}

func (f noisy) WriteAt(r *blk.Req, v blk.Vec, off int64, flags blk.Flags) error {
	if err := f.fill(f.Size(), off); err != nil {
		return err
	}
	return f.MemFile.WriteAt(r, v, off, flags)
}

func (f noisy) Resize(ctx context.Context, size int64, m blk.Prealloc) error {
	old := f.Size()
	if err := f.MemFile.Resize(ctx, size, m); err != nil {
		return err
	}
	return f.fill(old, size)
}

func (f noisy) Zero(r *blk.Req, off, n int64, flags blk.Flags) error {
	if flags&blk.NoFallback != 0 {
		return blk.ErrNotSupported
	}
	return f.WriteAt(r, blk.Buf(make([]byte, n)), off, flags&^(blk.MayUnmap|blk.Grow))
}

// What was never written reads as zeroes, too, where the file grows by noise, and so it does after
// the image is opened again.
func TestNoise(t *testing.T) {
	for _, extended := range []bool{false, true} {
		const size = 4 << 20
		f := noisy{mustCreate(t, CreateOptions{Size: size, Extended: extended})}
		want := make([]byte, size)
		s := mustOpen(t, mem{f}, config{})
		for i, off := range []int64{512, 1<<20 + 100, 1<<20 - 5000, 3 << 20, 2<<20 + 65535} {
			b := bytes.Repeat([]byte{byte(i + 1)}, 1000)
			copy(want[off:], b)
			if err := s.WriteAt(req(), blk.Buf(b), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			got := make([]byte, size)
			if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil {
				t.Fatal(err)
			}
			for i := range got {
				if got[i] != want[i] {
					t.Fatalf("extended %v: byte %d is %#x, want %#x", extended, i, got[i], want[i])
				}
			}
			mustClose(t, s)
			s = mustOpen(t, mem{f}, config{})
		}
		mustClose(t, s)
	}
}
