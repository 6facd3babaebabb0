package drivertest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"qblockd/graph/blk"
)

var req = &blk.Req{Ctx: context.Background()}

func write(t *testing.T, d interface {
	WriteAt(*blk.Req, blk.Vec, int64, blk.Flags) error
}, off int64, b byte, n int, f blk.Flags) {
	t.Helper()
	if err := d.WriteAt(req, blk.Buf(bytes.Repeat([]byte{b}, n)), off, f); err != nil {
		t.Fatal(err)
	}
}

// Writes, zeroes, discards and resizes against a byte slice.
func TestMemFileModel(t *testing.T) {
	const max = 64 << 10
	rng := rand.New(rand.NewPCG(1, 2))
	m := NewMemFile(0)
	var model []byte
	grow := func(n int) {
		for len(model) < n {
			model = append(model, 0)
		}
	}
	for i := range 3000 {
		off, n := rng.IntN(max), 1+rng.IntN(9000)
		switch rng.IntN(5) {
		case 0, 1:
			grow(off + n)
			copy(model[off:], bytes.Repeat([]byte{byte(i)}, n))
			write(t, m, int64(off), byte(i), n, 0)
		case 2:
			grow(off + n)
			clear(model[off : off+n])
			if err := m.Zero(req, int64(off), int64(n), 0); err != nil {
				t.Fatal(err)
			}
		case 3:
			if off < len(model) {
				clear(model[off:min(len(model), off+n)])
			}
			if err := m.Discard(req, int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
		case 4:
			if off < len(model) {
				model = model[:off:off]
			}
			grow(off)
			if err := m.Resize(context.Background(), int64(off), blk.PreallocOff); err != nil {
				t.Fatal(err)
			}
		}
		if got := m.Bytes(); !bytes.Equal(got, model) {
			t.Fatalf("step %d: content differs (%d bytes, want %d)", i, len(got), len(model))
		}
	}
}

// What was flushed or written with FUA survives every crash, what was not may go or stay, and
// each sector is in one of the states it had.
func TestCrash(t *testing.T) {
	c := NewCrashFile(0)
	write(t, c, 0, 1, 4096, 0)
	if err := c.Flush(req); err != nil {
		t.Fatal(err)
	}
	write(t, c, 512, 2, 1024, 0)
	write(t, c, 1024, 3, 1024, 0)
	write(t, c, 2048, 4, 512, blk.FUA)
	write(t, c, 8192, 5, 512, 0)
	seen := map[string]bool{}
	for seed := range uint64(400) {
		b := c.Crash(seed).Bytes()
		if len(b) != 4096 && len(b) != 8192+512 {
			t.Fatalf("size %d", len(b))
		}
		var s []byte
		for i := 0; i < 4096; i += 512 {
			if !bytes.Equal(b[i:i+512], bytes.Repeat(b[i:i+1], 512)) {
				t.Fatalf("sector %d torn inside", i/512)
			}
			s = append(s, '0'+b[i])
		}
		if len(b) > 4096 {
			s = append(s, '0'+b[8192])
		}
		seen[string(s)] = true
		if b[0] != 1 || b[2048] != 4 || b[2560] != 1 {
			t.Fatalf("seed %d: lost what was on the medium: %s", seed, s)
		}
		for i, ok := range []string{"1", "12", "123", "13"} {
			if !bytes.ContainsRune([]byte(ok), rune(s[i])) {
				t.Fatalf("seed %d: sector %d in a state it never had: %s", seed, i, s)
			}
		}
		if again := c.Crash(seed).Bytes(); !bytes.Equal(again, b) {
			t.Fatalf("seed %d gives two results", seed)
		}
	}
	for _, want := range []string{"11114111", "12134111", "12334111"} {
		if !seen[want] && !seen[want+"0"] && !seen[want+"5"] {
			t.Errorf("never saw %s", want)
		}
	}
	if got := c.Kill().Bytes(); !bytes.Equal(got, c.Bytes()) {
		t.Error("a kill lost something")
	}
	if err := c.Flush(req); err != nil || c.Pending() != 0 {
		t.Errorf("flush: %v, %d sectors pending", err, c.Pending())
	}
	if got := c.Crash(7).Bytes(); !bytes.Equal(got, c.Bytes()) {
		t.Error("a crash after a flush lost something")
	}
}

// A crash between shrinking and flushing may show the old end again.
func TestCrashShrink(t *testing.T) {
	c := CrashFileOf(MemFileOf(bytes.Repeat([]byte{7}, 8192)))
	if err := c.Resize(context.Background(), 1000, blk.PreallocOff); err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for seed := range uint64(50) {
		b := c.Crash(seed).Bytes()
		seen[len(b)] = true
		if !bytes.Equal(b[:1000], bytes.Repeat([]byte{7}, 1000)) {
			t.Fatal("lost what was not cut off")
		}
	}
	if !seen[1000] || !seen[8192] || len(seen) != 2 {
		t.Errorf("sizes seen: %v", seen)
	}
}

func TestFault(t *testing.T) {
	f := NewFault(NewMemFile(8192))
	f.FailAt(1, syscall.ENOSPC)
	write(t, f, 0, 1, 512, 0)
	if err := f.WriteAt(req, blk.Buf(make([]byte, 512)), 0, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("second call: %v", err)
	}
	write(t, f, 0, 1, 512, 0)
	f.Inject(Rule{Ops: OpFlush})
	f.Inject(Rule{Ops: OpRead, Off: 4096, N: 512, AfterEffect: true, Err: syscall.EPERM})
	if err := f.Flush(req); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush: %v", err)
	}
	b := make([]byte, 512)
	if err := f.ReadAt(req, blk.Buf(b), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadAt(req, blk.Buf(b), 4096, 0); !errors.Is(err, syscall.EPERM) {
		t.Fatalf("read: %v", err)
	}
	if f.Failed() != 3 || f.Calls() != 6 {
		t.Errorf("%d of %d calls failed", f.Failed(), f.Calls())
	}
}
