package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// leaving is a file whose user leaves at one of the calls, before or after it was made. Then it
// does nothing more for that user.
type leaving struct {
	mem
	n, at int
	after bool
	leave context.CancelFunc
}

func (l *leaving) call(r *blk.Req, do func() error) error {
	n := l.n
	l.n++
	if n == l.at && !l.after {
		l.leave()
	}
	if r.Ctx.Err() != nil {
		return syscall.ECANCELED
	}
	err := do()
	if n == l.at && l.after {
		l.leave()
	}
	return err
}

func (l *leaving) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return l.call(r, func() error { return l.mem.ReadAt(r, v, off, f) })
}

func (l *leaving) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return l.call(r, func() error { return l.mem.WriteAt(r, v, off, f) })
}

func (l *leaving) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return l.call(r, func() error { return l.mem.Zero(r, off, n, f) })
}

func (l *leaving) Flush(r *blk.Req) error {
	return l.call(r, func() error { return l.mem.Flush(r) })
}

func (l *leaving) Discard(r *blk.Req, off, n int64) error {
	return l.call(r, func() error { return l.mem.Discard(r, off, n) })
}

func (l *leaving) Resize(ctx context.Context, size int64, exact bool, p blk.Prealloc) error {
	return l.call(&blk.Req{Ctx: ctx}, func() error { return l.mem.Resize(ctx, size, exact, p) })
}

// TestEachLeaving lets the client of a command leave at the i-th call of the file, for all i: the
// image has no leaks and no corruption, what others wrote is there, and what was made is what the
// image then has.
func TestEachLeaving(t *testing.T) {
	for _, sh := range []shape{{cs: 512, bits: 64, v: "v3"}, {cs: 4096, bits: 16, v: "v3"}, {cs: 1024, bits: 16, v: "v2"}, {cs: 512, bits: 64, v: "v3", lazy: true}} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			left := 0
			for i := 0; leaveOnce(t, sh, i, i%2 == 1); i++ {
				if left++; testing.Short() {
					i += 6
				}
			}
			t.Logf("%d clients", left)
		})
	}
}

// leaveOnce lets everything be done to an image by clients of whom one leaves; false: there are
// fewer calls than that.
func leaveOnce(t *testing.T, sh shape, i int, after bool) bool {
	cs := int64(sh.cs)
	size := cs * 150
	img := mustCreate(t, CreateOptions{Size: uint64(size), ClusterSize: &sh.cs, RefcountBits: &sh.bits, Version: sh.v, LazyRefcounts: sh.lazy})
	f := &leaving{mem: mem{img}, at: -1}
	k := &memKeeper{}
	s := mustOpen(t, f, config{keeper: k})
	s.l2.max, s.rb.max = 4, 4
	f.n, f.at, f.after = 0, i, after

	at := "nobody has left"
	client := func(what string, do func(r *blk.Req) error) bool {
		t.Helper()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		f.leave = cancel
		err := do(&blk.Req{Ctx: ctx})
		if ctx.Err() != nil {
			at = fmt.Sprintf("call %d (%s), after %v", i, what, after)
		}
		if err != nil && !errors.Is(err, syscall.ECANCELED) && !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: %s: %v", at, what, err)
		}
		return err == nil
	}
	disk := make([]byte, size)
	write := func(r *blk.Req, gc, n int64, v byte, fl blk.Flags) error {
		b := bytes.Repeat([]byte{v}, int(n*cs))
		err := s.WriteAt(r, blk.Buf(b), gc*cs, fl)
		if err != nil { // again, by somebody who stays
			err = errors.Join(err, s.WriteAt(req(), blk.Buf(b), gc*cs, fl))
		}
		copy(disk[gc*cs:], b)
		return err
	}
	for gc := range int64(20) {
		client("write", func(r *blk.Req) error { return write(r, 5*gc, 2, byte(gc+1), 0) })
	}
	client("compressed write", func(r *blk.Req) error { return write(r, 130, 1, 77, blk.Compressed) })
	client("flush", s.Flush)
	ids := map[string]string{}
	snap := func(name string) {
		client("snapshot", func(r *blk.Req) error {
			id, err := s.CreateSnapshot(r, name, time.Unix(0, 0), 0)
			if err == nil {
				ids[name] = id
			}
			return err
		})
	}
	snap("a")
	client("write", func(r *blk.Req) error { return write(r, 3, 9, 88, 0) })
	snap("b")
	forget := func(name string) {
		if id, ok := ids[name]; ok {
			client("delete a snapshot", func(r *blk.Req) error { return s.DeleteSnapshot(r, id, name) })
		}
	}
	forget("a")
	if sh.v == "v3" {
		for b, name := range []string{"b0", "b1", "b2"} {
			m := bitmap.New(size, 512)
			m.Set(int64(b)*5000, 6000)
			k.list = append(k.list, persisted{name: name, bits: m, enabled: true})
			if !client("add a bitmap", func(r *blk.Req) error { return s.HoldBitmap(r, name) }) {
				k.list = k.list[:len(k.list)-1]
				client("take it back", func(*blk.Req) error { return s.RemoveBitmap(req(), name) })
			}
		}
		if len(k.list) > 0 {
			name := k.list[0].name
			k.list = k.list[1:]
			client("remove a bitmap", func(r *blk.Req) error { return s.RemoveBitmap(r, name) })
		}
	}
	if sh.v == "v2" { // which cannot be resized while it has one
		for len(s.snaps) > 0 {
			if err := s.DeleteSnapshot(req(), s.snaps[0].ID, s.snaps[0].Name); err != nil {
				t.Fatalf("%s: %v", at, err)
			}
		}
	}
	client("grow", func(r *blk.Req) error { return s.Resize(r, size*80, blk.PreallocOff) })
	client("shrink", func(r *blk.Req) error { return s.Resize(r, s.size.Load()/2/512*512, blk.PreallocOff) })
	client("flush", s.Flush)
	if f.n <= i {
		mustClose(t, s)
		return false
	}

	got := make([]byte, size)
	if n := s.size.Load(); n < size {
		got = got[:n]
	}
	if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil {
		t.Fatalf("%s: %v", at, err)
	}
	live, snaps := s.size.Load(), len(s.snaps)
	if live == size && !bytes.Equal(got, disk) {
		t.Fatalf("%s: what is there is not what was written", at)
	}
	mustClose(t, s)
	s = mustOpen(t, mem{img}, config{keeper: &memKeeper{}, readOnly: true})
	if n := s.size.Load(); n != live || len(s.snaps) != snaps {
		t.Fatalf("%s: size %d and %d snapshots, and %d and %d once the image is opened again", at, live, snaps, n, len(s.snaps))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if res, err := s.check(req(), false); err != nil || res.Corruptions+res.Errors+res.Leaks > 0 {
		t.Fatalf("%s: %v, %+v", at, err, *res)
	}
	return true
}
