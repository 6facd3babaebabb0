package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
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
	for _, sh := range []shape{
		{cs: 512, bits: 64, v: "v3"}, {cs: 4096, bits: 16, v: "v3"}, {cs: 1024, bits: 16, v: "v2"},
		{cs: 512, bits: 64, v: "v3", lazy: true},
	} {
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

// visit is an image to which clients do everything, one of whom leaves.
type visit struct {
	t    *testing.T
	f    *leaving
	k    *memKeeper
	s    *image
	disk []byte            // what was written
	ids  map[string]string // of snapshots, by name
	at   string            // who has left
}

// client does something as a client who may leave, and tells whether it succeeded.
func (d *visit) client(what string, do func(r *blk.Req) error) bool {
	d.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	d.f.leave = cancel
	err := do(&blk.Req{Ctx: ctx})
	if ctx.Err() != nil {
		d.at = fmt.Sprintf("call %d (%s), after %v", d.f.at, what, d.f.after)
	}
	if err != nil && !errors.Is(err, syscall.ECANCELED) && !errors.Is(err, context.Canceled) {
		d.t.Fatalf("%s: %s: %v", d.at, what, err)
	}
	return err == nil
}

// write writes n clusters from gc.
func (d *visit) write(what string, gc, n int64, v byte, fl blk.Flags) {
	d.client(what, func(r *blk.Req) error {
		cs := d.s.cs
		b := bytes.Repeat([]byte{v}, int(n*cs))
		err := d.s.WriteAt(r, blk.Buf(b), gc*cs, fl)
		if err != nil { // again, by somebody who stays
			err = errors.Join(err, d.s.WriteAt(req(), blk.Buf(b), gc*cs, fl))
		}
		copy(d.disk[gc*cs:], b)
		return err
	})
}

func (d *visit) snapshot(name string) {
	d.client("snapshot", func(r *blk.Req) error {
		id, err := d.s.CreateSnapshot(r, name, time.Unix(0, 0), 0)
		if err == nil {
			d.ids[name] = id
		}
		return err
	})
}

// bitmaps adds some, and removes one.
func (d *visit) bitmaps() {
	for b, name := range []string{"b0", "b1", "b2"} {
		m := bitmap.New(int64(len(d.disk)), 512)
		m.Set(int64(b)*5000, 6000)
		d.k.list = append(d.k.list, persisted{name: name, bits: m, enabled: true})
		if !d.client("add a bitmap", func(r *blk.Req) error { return d.s.HoldBitmap(r, name) }) {
			d.k.list = d.k.list[:len(d.k.list)-1]
			d.client("take it back", func(*blk.Req) error { return d.s.RemoveBitmap(req(), name) })
		}
	}
	if len(d.k.list) > 0 {
		name := d.k.list[0].name
		d.k.list = d.k.list[1:]
		d.client("remove a bitmap", func(r *blk.Req) error { return d.s.RemoveBitmap(r, name) })
	}
}

// leaveOnce lets everything be done to an image by clients of whom one leaves; false: there are
// fewer calls than that.
func leaveOnce(t *testing.T, sh shape, i int, after bool) bool {
	size := int64(sh.cs) * 150
	img := mustCreate(t, sh.options(uint64(size)))
	d := &visit{
		t: t, f: &leaving{mem: mem{img}, at: -1}, k: &memKeeper{},
		disk: make([]byte, size), ids: map[string]string{}, at: "nobody has left",
	}
	d.s = mustOpen(t, d.f, config{keeper: d.k})
	setCaches(d.s, 4, 4)
	d.f.n, d.f.at, d.f.after = 0, i, after

	for gc := range int64(20) {
		d.write("write", 5*gc, 2, byte(gc+1), 0)
	}
	d.write("compressed write", 130, 1, 77, blk.Compressed)
	d.client("flush", d.s.Flush)
	d.snapshot("a")
	d.write("write", 3, 9, 88, 0)
	d.snapshot("b")
	if id, ok := d.ids["a"]; ok {
		d.client("delete a snapshot", func(r *blk.Req) error { return d.s.DeleteSnapshot(r, id, "a") })
	}
	if sh.v == "v3" {
		d.bitmaps()
	}
	for sh.v == "v2" && len(peek(d.s).snaps) > 0 { // it cannot be resized while it has one
		if err := d.s.DeleteSnapshot(req(), peek(d.s).snaps[0].ID, peek(d.s).snaps[0].Name); err != nil {
			t.Fatalf("%s: %v", d.at, err)
		}
	}
	d.client("grow", func(r *blk.Req) error { return d.s.Resize(r, size*80, blk.PreallocOff) })
	d.client("shrink", func(r *blk.Req) error { return d.s.Resize(r, d.s.size.Load()/2/512*512, blk.PreallocOff) })
	d.client("flush", d.s.Flush)
	if d.f.n <= i {
		mustClose(t, d.s)
		return false
	}
	d.verify(img)
	return true
}

// verify closes the image, opens it again, and looks it over.
func (d *visit) verify(img *drivertest.MemFile) {
	s, size := d.s, int64(len(d.disk))
	got := make([]byte, min(size, s.size.Load()))
	if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil {
		d.t.Fatalf("%s: %v", d.at, err)
	}
	live, snaps := s.size.Load(), len(peek(s).snaps)
	if live == size && !bytes.Equal(got, d.disk) {
		d.t.Fatalf("%s: what is there is not what was written", d.at)
	}
	mustClose(d.t, s)
	s = mustOpen(d.t, mem{img}, config{keeper: &memKeeper{}, readOnly: true})
	if n := s.size.Load(); n != live || len(peek(s).snaps) != snaps {
		d.t.Fatalf("%s: size %d and %d snapshots, and %d and %d once the image is opened again", d.at, live, snaps, n, len(peek(s).snaps))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if res, err := s.check(req(), false); err != nil || res.Corruptions+res.Errors+res.Leaks > 0 {
		d.t.Fatalf("%s: %v, %+v", d.at, err, *res)
	}
}
