package quorum

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// what is in the copies, in a letter each, which of them fail, and what comes of a read of sectors
// 1 and 2. A small letter is a copy that has other contents, and a digit one that fails with that
// errno.
var votes = []struct {
	copies    string
	threshold int64
	want      string // what is read, or the errno
	events    string
}{
	{"AAA", 2, "A", ""},
	{"ABA", 2, "A", "c1 read 1+2"},
	{"BAA", 2, "A", "c0 read 1+2"},
	{"AAB", 2, "A", "c2 read 1+2"},
	{"ABC", 2, "5", "q failed 1+2"},
	{"AB", 2, "5", "q failed 1+2"},
	// Of two that have as many votes the later one wins.
	{"AB", 1, "B", "c0 read 1+2"},
	{"ABBA", 2, "B", "c3 read 1+2, c0 read 1+2"},
	{"BACAD", 2, "A", "c4 read 1+2, c2 read 1+2, c0 read 1+2"},
	{"5AA", 2, "A", "c0 read 1+2 Input/output error"},
	{"A5A", 2, "A", "c1 read 1+2 Input/output error"},
	{"A5B", 2, "5", "c1 read 1+2 Input/output error, q failed 1+2"},
	{"5A6", 2, "6", "c0 read 1+2 Input/output error, c2 read 1+2 No such device or address, q failed 1+2"},
	{"56A6", 2, "6", "c0 read 1+2 Input/output error, c1 read 1+2 No such device or address, c3 read 1+2 No such device or address, q failed 1+2"},
	{"56", 1, "6", "c0 read 1+2 Input/output error, c1 read 1+2 No such device or address, q failed 1+2"},
	{"65", 1, "5", "c0 read 1+2 No such device or address, c1 read 1+2 Input/output error, q failed 1+2"},
	{"5", 1, "5", "c0 read 1+2 Input/output error, q failed 1+2"},
}

// TestVotes has what copies agree about, and who hears of it, as QEMU has it. Requests of one piece
// and of several are the same.
func TestVotes(t *testing.T) {
	for _, v := range votes {
		for _, large := range []bool{false, true} {
			c := newCopies(t, len(v.copies), 16<<20, types.BlockdevOptionsQuorum{VoteThreshold: v.threshold})
			off, n := int64(512), int64(1024)
			if large {
				off, n = 1<<20, 5<<20+512
			}
			for i, what := range v.copies {
				if what >= 'A' {
					c.files[i].Poke(off+n-700, bytes.Repeat([]byte{byte(what)}, 700))
					continue
				}
				// A large request fails in its last piece.
				c.faults[i].Inject(drivertest.Rule{Ops: drivertest.OpRead, Off: off + n - 1, N: 1, Err: syscall.Errno(what - '0')})
			}
			b, err := c.guest(t).read(off, n)
			got := string(b[n-1])
			if err != nil {
				got = string('0' + rune(blk.Errno(err)))
			}
			if got != v.want {
				t.Errorf("%s, threshold %d, large %v: %q (%v), want %q", v.copies, v.threshold, large, got, err, v.want)
			}
			if told := c.events(); !large && told != v.events {
				t.Errorf("%s, threshold %d: told %q, want %q", v.copies, v.threshold, told, v.events)
			}
		}
	}
}

// TestRewrite: with rewrite-corrupted what lost the vote gets what won it, and nothing else.
func TestRewrite(t *testing.T) {
	for _, large := range []int64{0, 3 << 20} {
		c := newCopies(t, 3, 8<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2, RewriteCorrupted: new(true)})
		c.files[0].Poke(4096, bytes.Repeat([]byte{9}, 8192))
		g := c.guest(t)
		b, err := g.read(4096, 4096+large)
		if err != nil || !blk.IsZero(b) {
			t.Fatal(err, b[0])
		}
		first := 4096 + min(large, 4096)
		if got := c.files[0].Bytes(); !blk.IsZero(got[:4096+first]) || first == 4096 && got[8192] != 9 {
			t.Errorf("large %d: not mended, or too much", large)
		}
		c.faults[0].Inject(drivertest.Rule{Ops: drivertest.OpWrite})
		c.files[0].Poke(0, []byte{1})
		if b, err := g.read(0, 512); err != nil || b[0] != 0 {
			t.Errorf("a copy that cannot be mended: %v, %d", err, b[0])
		}
	}
}

// TestChanges: writes, zeroes and flushes succeed if enough copies do.
func TestChanges(t *testing.T) {
	for _, o := range []struct {
		name string
		op   drivertest.Op
		do   func(g guest) error
		told string
	}{
		{"write", drivertest.OpWrite, func(g guest) error { return g.WriteAt(g.r, blk.Buf([]byte("xyz")), 1023, 0) }, "write 1+2"},
		{"zero", drivertest.OpZero, func(g guest) error { return g.Zero(g.r, 0, 4096, 0) }, "write 0+8"},
		{"flush", drivertest.OpFlush, func(g guest) error { return g.Flush(g.r) }, "flush 0+0"},
	} {
		c := newCopies(t, 3, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2})
		g := c.guest(t)
		write := func() { // so that there is something to flush
			t.Helper()
			if err := g.WriteAt(g.r, blk.Buf(make([]byte, 8192)), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		write()
		c.faults[1].Inject(drivertest.Rule{Ops: o.op, Err: syscall.ENOSPC})
		if err := o.do(g); err != nil {
			t.Errorf("%s: %v", o.name, err)
		}
		if got, want := c.events(), "c1 "+o.told+" No space left on device"; got != want {
			t.Errorf("%s: told %q, want %q", o.name, got, want)
		}
		c.faults[1].Clear()
		write()
		c.faults[1].Inject(drivertest.Rule{Ops: o.op})
		c.faults[2].Inject(drivertest.Rule{Ops: o.op, Err: syscall.ENOSPC})
		if err := o.do(g); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v", o.name, err)
		}
		want := "c1 " + o.told + " Input/output error, c2 " + o.told + " No space left on device"
		if o.name != "flush" {
			want += ", q failed " + o.told[len("write "):]
		}
		if got := c.events(); got != want {
			t.Errorf("%s: told %q, want %q", o.name, got, want)
		}
		for _, f := range c.faults {
			f.Clear()
		}
	}
}

// TestFirst: with fifo the first copy that can be read counts, whatever the others have.
func TestFirst(t *testing.T) {
	c := newCopies(t, 3, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 3, ReadPattern: &fifo})
	for i, f := range c.files {
		f.Poke(0, []byte{byte(i + 1)})
	}
	g := c.guest(t)
	for i, want := range []string{"", "c0 read 0+1 Input/output error", "c0 read 0+1 Input/output error, c1 read 0+1 Input/output error"} {
		if b, err := g.read(0, 512); err != nil || b[0] != byte(i+1) {
			t.Errorf("%d failed: %v, %d", i, err, b[0])
		}
		if got := c.events(); got != want {
			t.Errorf("%d failed: told %q", i, got)
		}
		c.faults[i].Inject(drivertest.Rule{Ops: drivertest.OpRead})
	}
	if _, err := g.read(0, 512); !errors.Is(err, syscall.EIO) {
		t.Errorf("all failed: %v", err)
	}
}

// TestVerify: a difference is the end of a quorum that is there to find one.
func TestVerify(t *testing.T) {
	c := newCopies(t, 2, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2, Blkverify: new(true)})
	g := c.guest(t)
	c.files[1].Poke(4096, []byte{1})
	_, before := g.read(0, 4096)
	_, at := g.read(4096, 512)
	_, after := g.read(0, 4096)
	if before != nil || !errors.Is(at, syscall.EIO) || !errors.Is(after, syscall.EIO) {
		t.Error(before, at, after)
	}
}
