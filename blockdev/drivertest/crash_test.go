package drivertest_test

import (
	"bytes"
	"context"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// A huge range that becomes zeroes costs what is there, and is lost by a power failure like any
// other.
func TestCrashHugeZero(t *testing.T) {
	const size = 1 << 50
	c := drivertest.NewCrashFile(size)
	data := bytes.Repeat([]byte{0xaa}, 1024)
	c.Poke(1<<40+512, data)
	r := &blk.Req{Ctx: context.Background()}
	if err := c.WriteAt(r, blk.Buf(data), 1<<41, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Zero(r, 0, size, 0); err != nil {
		t.Fatal(err)
	}
	shows := func(what string, m *drivertest.MemFile, off int64, want byte) {
		t.Helper()
		p := make([]byte, 1024)
		if err := m.ReadAt(r, blk.Buf(p), off, 0); err != nil || p[0] != want || p[1023] != want {
			t.Errorf("%s, at %d: %#x and %#x instead of %#x, %v", what, off, p[0], p[1023], want, err)
		}
	}
	shows("before the flush", c.Durable(), 1<<40+512, 0xaa)
	shows("before the flush", c.Durable(), 1<<41, 0)
	shows("of a killed process", c.Kill(), 1<<40+512, 0)
	if err := c.Flush(r); err != nil {
		t.Fatal(err)
	}
	shows("after the flush", c.Durable(), 1<<40+512, 0)
}
