package blkdebug

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func ptr[T any](v T) *T { return &v }

func begin(t *testing.T, o types.BlockdevOptionsBlkdebug) (*drivertest.MemFile, *graph.Root, *blk.Req) {
	t.Helper()
	for _, x := range o.InjectError {
		if x.Event == "" {
			x.Event = types.BlkdebugEventNone
		}
	}
	g := drivertest.NewGraph(t)
	mem := drivertest.NewMemFile(1 << 20)
	image := drivertest.AddNode(t, g, "image", mem)
	child := drivertest.FilteredFile(image)
	child.Name = "image"
	n := drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "d", DriverName: "blkdebug", Kind: graph.Filter},
		Children: []drivertest.Child{child},
		Open:     Def.With(&o),
	})
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.End(r) })
	return mem, root, r
}

func TestRules(t *testing.T) {
	_, root, r := begin(t, types.BlockdevOptionsBlkdebug{InjectError: []*types.BlkdebugInjectErrorOptions{
		{Iotype: ptr(types.BlkdebugIOTypeRead), Sector: ptr(int64(8)), Errno: ptr(int64(28))},
		{Iotype: ptr(types.BlkdebugIOTypeWrite), Once: ptr(true)},
		{Iotype: ptr(types.BlkdebugIOTypeFlush), Errno: ptr(int64(30)), Once: ptr(true)},
		{Iotype: ptr(types.BlkdebugIOTypeBlockStatus)},
	}})
	v := blk.Buf(make([]byte, 4096))
	status := func() error { _, err := root.Status(r, 0, 512); return err }
	for i, c := range []struct {
		got, want error
	}{
		{root.ReadAt(r, v, 0, 0), nil},
		{root.ReadAt(r, v, 4096, 0), syscall.ENOSPC},
		{root.ReadAt(r, v, 8192, 0), nil},
		{root.ReadAt(r, v, 512, 0), syscall.ENOSPC}, // it ends in the sector
		{root.WriteAt(r, v, 0, 0), syscall.EIO},
		{root.WriteAt(r, v, 0, 0), nil},
		{root.Flush(r), syscall.EROFS},
		{root.Zero(r, 0, 4096, 0), nil},
		{root.Discard(r, 0, 4096), nil},
		{status(), syscall.EIO},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("request %d: %v, want %v", i, c.got, c.want)
		}
	}
}

// TestDelay: what is delayed may not be asked for without waiting, and ends early with who asks. An
// errno of 0 makes it slow, not fail; a negative delay is none.
func TestDelay(t *testing.T) {
	const delay = 20 * time.Millisecond
	_, root, r := begin(t, types.BlockdevOptionsBlkdebug{InjectError: []*types.BlkdebugInjectErrorOptions{
		{Iotype: ptr(types.BlkdebugIOTypeRead), Errno: ptr(int64(0)), DelayNs: ptr(int64(delay))},
		{Iotype: ptr(types.BlkdebugIOTypeWrite), Immediately: ptr(true), Once: ptr(true), DelayNs: ptr(int64(delay))},
		{Iotype: ptr(types.BlkdebugIOTypeFlush), Immediately: ptr(true), Once: ptr(true), DelayNs: ptr(int64(-1))},
		{Iotype: ptr(types.BlkdebugIOTypeDiscard), DelayNs: ptr(int64(math.MaxInt64))},
	}})
	v := blk.Buf(make([]byte, 4096))
	for i, c := range []struct {
		do    func() error
		want  error
		delay time.Duration
	}{
		{func() error { return root.ReadAt(r, v, 0, 0) }, nil, delay},
		{func() error { return root.WriteAt(r, v, 0, 0) }, syscall.EIO, delay},
		{func() error { return root.WriteAt(r, v, 0, 0) }, nil, 0},
		{func() error { return root.Flush(r) }, syscall.EIO, 0},
	} {
		began := time.Now()
		if err := c.do(); !errors.Is(err, c.want) || time.Since(began) < c.delay {
			t.Errorf("request %d: %v after %v", i, err, time.Since(began))
		}
	}
	r.NoWait = true
	if err := root.ReadAt(r, v, 0, 0); err != blk.ErrWouldBlock {
		t.Error(err)
	}
	r.NoWait = false
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r.Ctx = ctx
	if err := root.Discard(r, 0, 4096); !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
}

// Requests that reach the image keep the limits.
func TestLimits(t *testing.T) {
	mem, root, r := begin(t, types.BlockdevOptionsBlkdebug{Align: ptr(int64(4096)), MaxTransfer: ptr(int32(8192))})
	if err := root.WriteAt(r, blk.Buf([]byte("unaligned")), 4093, 0); err != nil {
		t.Fatal(err)
	}
	if err := root.WriteAt(r, blk.Buf(make([]byte, 64<<10)), 1<<16, 0); err != nil {
		t.Fatal(err)
	}
	if got := string(mem.Bytes()[4093:4102]); got != "unaligned" {
		t.Errorf("%q", got)
	}
}

// TestStates: errors wait for their event in their state; an event that makes rules active takes
// the place of those that were; of rules for the same request the first counts.
func TestStates(t *testing.T) {
	_, root, r := begin(t, types.BlockdevOptionsBlkdebug{
		InjectError: []*types.BlkdebugInjectErrorOptions{
			{
				Event: types.BlkdebugEventPwritev, State: ptr(int64(2)), Iotype: ptr(types.BlkdebugIOTypeRead),
				Errno: ptr(int64(28)), Immediately: ptr(true),
			},
			{
				Event: types.BlkdebugEventPwritev, State: ptr(int64(2)), Iotype: ptr(types.BlkdebugIOTypeRead),
				Immediately: ptr(true),
			},
			{
				Event: types.BlkdebugEventPwritevZero, Iotype: ptr(types.BlkdebugIOTypeFlush),
				Immediately: ptr(true), Once: ptr(true),
			},
		},
		SetState: []*types.BlkdebugSetStateOptions{
			{Event: types.BlkdebugEventPwritev, State: ptr(int64(1)), NewState: 2},
			{Event: types.BlkdebugEventPwritev, State: ptr(int64(2)), NewState: 3},
			{Event: types.BlkdebugEventPwritev, State: ptr(int64(2)), NewState: 4},
		},
	})
	v := blk.Buf(make([]byte, 4096))
	read := func() error { return root.ReadAt(r, v, 0, 0) }
	write := func() error { return root.WriteAt(r, v, 0, 0) }
	for i, c := range []struct {
		do   func() error
		want error
	}{
		{read, nil}, {write, nil}, // to state 2
		{read, nil}, {write, nil}, // to state 3; the errors become active
		{read, syscall.ENOSPC}, {write, nil}, {read, syscall.ENOSPC},
		{func() error { return root.Flush(r) }, nil},
		{func() error { return root.Zero(r, 0, 4096, 0) }, nil},
		{read, nil},
		{write, nil},
		{func() error { return root.Flush(r) }, syscall.EIO},
	} {
		if err := c.do(); !errors.Is(err, c.want) {
			t.Errorf("request %d: %v, want %v", i, err, c.want)
		}
	}
}

// FuzzConfig reads anything as a file of rules.
func FuzzConfig(f *testing.F) {
	f.Add("[inject-error]\nevent = \"none\"\nonce = \"on\"\n# no\n[set-state]\nevent = \"pwritev\"\nnew_state = \"0x2\"\n")
	f.Add("[set-state \"x\"]\nevent=\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		name := filepath.Join(t.TempDir(), "c")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		inject, set, err := readConfig(name)
		if err != nil && (inject != nil || set != nil) {
			t.Error("both rules and an error")
		}
	})
}
