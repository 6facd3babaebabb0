package graph

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// told is a Recorder that says in words what it heard since it was asked last.
type told struct {
	lines []string
	fails error
}

func (r *told) record(l []Change) error {
	if r.fails != nil {
		return r.fails
	}
	for _, c := range l {
		line := c.Key.String() + ": "
		switch v := c.Value.(type) {
		case nil:
			line += "gone"
		case NodeState:
			line += fmt.Sprintf("%s ro=%v inactive=%v owned=%v", v.Options.DriverName, v.ReadOnly, v.Inactive, v.Owned)
		case EdgeState:
			line += v.Child
		case *types.BlockDirtyBitmapAdd:
			line += fmt.Sprintf("%d persistent=%v disabled=%v", *v.Granularity, *v.Persistent, *v.Disabled)
		default:
			line += fmt.Sprint(v)
		}
		r.lines = append(r.lines, line)
	}
	return nil
}

func (r *told) expect(t *testing.T, want ...string) {
	t.Helper()
	slices.Sort(r.lines)
	slices.Sort(want)
	if !slices.Equal(r.lines, want) {
		t.Errorf("recorded\n\t%s\nwant\n\t%s", strings.Join(r.lines, "\n\t"), strings.Join(want, "\n\t"))
	}
	r.lines = nil
}

// TestRecord: what each change says to a recorder.
func TestRecord(t *testing.T) {
	g, r := newTestGraph(t), &told{}
	g.SetRecorder(r.record)
	do := func(f func(tx *Tx) error) {
		t.Helper()
		tx := g.Begin(context.Background())
		defer tx.Abort()
		if err := errors.Join(f(tx), tx.Commit()); err != nil {
			t.Error(err)
		}
	}
	file, file2 := addMem(t, g, "file"), addMem(t, g, "file2")
	disk := addFormat(t, g, "disk", file, nil)
	r.expect(t, "node file: mem ro=false inactive=false owned=true", "node file2: mem ro=false inactive=false owned=true",
		"node disk: fmt ro=false inactive=false owned=true", "node disk.file: file")

	var root *Root
	do(func(tx *Tx) (err error) {
		of := NewRecord(Key{Kind: StateExport, Name: "e"}, "its options")
		root, err = tx.AttachRoot(RootSpec{EdgeName: "root", Claim: readAll, Of: of}, disk)
		return err
	})
	r.expect(t, "export e: its options", "export e.root: disk")
	do(func(tx *Tx) error { return tx.SetClaim(root.Edge(), perm.Claim{Share: perm.All}) })
	nobody := addRoot(t, g, disk, readAll)
	r.expect(t)
	overlay := addFormat(t, g, "overlay", file2, nil)
	r.expect(t, "node overlay: fmt ro=false inactive=false owned=true", "node overlay.file: file2")
	do(func(tx *Tx) error {
		_, err := tx.InsertFilter(overlay, "backing", disk)
		return errors.Join(err, tx.SetReadOnly(disk, true))
	})
	r.expect(t, "export e.root: overlay", "node disk: fmt ro=true inactive=false owned=true", "node overlay.backing: disk")
	do(func(tx *Tx) error {
		o := *disk.Options()
		o.DetectZeroes = types.BlockdevDetectZeroesOptionsOn
		return errors.Join(tx.SetOptions(disk, &o), tx.SetInactive(overlay, true), tx.SetInactive(disk, true))
	})
	r.expect(t, "node disk: fmt ro=true inactive=true owned=true", "node overlay: fmt ro=false inactive=true owned=true")
	do(func(tx *Tx) error { return errors.Join(tx.SetInactive(disk, false), tx.SetInactive(overlay, false)) })
	r.expect(t, "node disk: fmt ro=true inactive=false owned=true", "node overlay: fmt ro=false inactive=false owned=true")

	// Something else under the same name comes after what goes.
	do(func(tx *Tx) error {
		e := tx.Child(overlay, "backing")
		if err := tx.Detach(e); err != nil {
			return err
		}
		_, err := tx.Attach(overlay, "backing", perm.COW, file)
		return err
	})
	if len(r.lines) == 2 && r.lines[0] != "node overlay.backing: gone" {
		t.Errorf("out of order: %q", r.lines)
	}
	r.expect(t, "node overlay.backing: gone", "node overlay.backing: file")
	for _, x := range []*Root{root, nobody} {
		if err := g.CloseRoot(context.Background(), x); err != nil {
			t.Error(err)
		}
	}
	r.expect(t, "export e: gone", "export e.root: gone")
	do(func(tx *Tx) error { return tx.Delete("overlay") })
	r.expect(t, "node overlay: gone", "node overlay.file: gone", "node overlay.backing: gone")
}

// TestRecordOfRoot: what a root has comes and goes with it, and changes meanwhile.
func TestRecordOfRoot(t *testing.T) {
	g, r := newTestGraph(t), &told{}
	n := addMem(t, g, "n")
	g.SetRecorder(r.record)
	of := NewRecord(Key{Kind: StateJob, Name: "j"}, "no arguments yet")
	set := func(values ...string) {
		t.Helper()
		for _, v := range values {
			if err := of.Set(v); err != nil {
				t.Error(err)
			}
		}
	}
	set("its arguments")
	tx := g.Begin(context.Background())
	defer tx.Abort()
	job, err := tx.AttachRoot(RootSpec{StayAtNode: true, Claim: readAll, Of: of}, n)
	if err := errors.Join(err, tx.Commit()); err != nil {
		t.Fatal(err)
	}
	r.expect(t, "job j: its arguments")
	set("others", "others") // the second time nothing changes
	r.expect(t, "job j: others")
	if err := g.CloseRoot(context.Background(), job); err != nil {
		t.Error(err)
	}
	r.expect(t, "job j: gone")
	set("what nobody needs any more")
	r.expect(t)
}

// TestRecordWithoutRoot: what no root has is there for as long as its owner says.
func TestRecordWithoutRoot(t *testing.T) {
	g, r := newTestGraph(t), &told{}
	g.SetRecorder(r.record)
	x := NewRecord(Key{Kind: StateJob, Name: "j"}, "its arguments")
	r.fails = errors.New("no room")
	if err := g.Enter(x); !errors.Is(err, r.fails) {
		t.Error(err)
	}
	r.fails = nil
	if err := errors.Join(x.Set("others"), g.Enter(x)); err != nil {
		t.Error(err)
	}
	r.expect(t, "job j: others")
	r.fails = errors.New("no room")
	if err := x.Set("refused"); !errors.Is(err, r.fails) || x.Value() != "others" {
		t.Errorf("%v, now %v", err, x.Value())
	}
	g.Leave(x) // cannot fail
	r.fails = nil
	if err := x.Set("afterwards"); err != nil {
		t.Error(err)
	}
	r.expect(t)
}

// TestRecordFails: what can be refused is undone, and what cannot goes on.
func TestRecordFails(t *testing.T) {
	g := newTestGraph(t)
	r := &told{}
	g.SetRecorder(r.record)
	below := add(t, g, Options{Name: "below", DriverName: "mem", Kind: Protocol}, mem(512))
	top := addFormat(t, g, "top", below, nil)
	export, err := tryRoot(g, top, readAll)
	if err != nil {
		t.Fatal(err)
	}
	r.lines = nil
	before := dump(g)
	r.fails = errors.New("no room")
	if _, err := tryAdd(g, Options{Name: "late"}, mem(1)); !errors.Is(err, r.fails) {
		t.Error(err)
	}
	tx := g.Begin(context.Background())
	if err := errors.Join(tx.SetOptions(below, &Options{Direct: true}), tx.Commit()); !errors.Is(err, r.fails) {
		t.Error(err)
	}
	if after := dump(g); after != before {
		t.Errorf("%s\nbecame\n%s", before, after)
	}
	if err := g.CloseRoot(context.Background(), export); err != nil {
		t.Error(err)
	}
	if len(r.lines) > 0 {
		t.Error(r.lines)
	}
}

// TestRecordBitmaps: bitmaps are told with the transaction that holds their node, as they will be
// after it.
func TestRecordBitmaps(t *testing.T) {
	g := newTestGraph(t)
	r := &told{}
	g.SetRecorder(r.record)
	n := add(t, g, Options{Name: "n", DriverName: "mem", Kind: Protocol}, mem(4096))
	r.lines = nil
	step := func(f func()) error {
		h, err := g.HoldNodes(context.Background(), n)
		if err != nil {
			return err
		}
		defer h.Release()
		tx := g.Begin(context.Background())
		tx.Under(h)
		f()
		return tx.Commit()
	}
	mk := func(s DirtyBitmapSpec) *DirtyBitmap {
		d, err := n.Bitmaps().New(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	var a, b *DirtyBitmap
	for _, x := range []struct {
		do   func()
		want []string
	}{
		{func() {
			a, b = mk(DirtyBitmapSpec{Name: "a"}), mk(DirtyBitmapSpec{Name: "b", Granularity: 512, Disabled: true})
		},
			[]string{"bitmap n.a: 65536 persistent=false disabled=false", "bitmap n.b: 512 persistent=false disabled=true"}},
		{func() { mk(DirtyBitmapSpec{}); a.SetBusy(true); a.Freeze() }, nil},
		{func() { b.Enable(); b.change(func() { b.persistent = true }) },
			[]string{"bitmap n.b: 512 persistent=true disabled=false"}},
		{func() { a.Reclaim(); a.SetPending(PendingDisable); b.SetPending(PendingRemove) },
			[]string{"bitmap n.a: 65536 persistent=false disabled=true", "bitmap n.b: gone"}},
		{func() { a.Disable(); b.Remove() }, nil},
	} {
		if err := step(x.do); err != nil {
			t.Error(err)
		}
		r.expect(t, x.want...)
	}
	r.fails = errors.New("no room")
	if err := step(func() { a.SetPending(PendingNone); a.Enable() }); !errors.Is(err, r.fails) {
		t.Error(err)
	}
	r.fails = nil
	if err := step(func() {}); err != nil {
		t.Error(err)
	}
	r.expect(t, "bitmap n.a: 65536 persistent=false disabled=false")
	tx := g.Begin(context.Background())
	if err := errors.Join(tx.Delete("n"), tx.Commit()); err != nil {
		t.Error(err)
	}
	r.expect(t, "node n: gone", "bitmap n.a: gone")
	if told, _ := n.bitmaps.states(); len(told) > 0 {
		t.Error("a node that is gone has bitmaps told")
	}
}
