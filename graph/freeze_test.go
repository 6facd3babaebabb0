package graph

import (
	"context"
	"errors"
	"testing"
)

func TestFreezeOverlays(t *testing.T) {
	g := newTestGraph(t)
	f1, f2 := addMem(t, g, "f1"), addMem(t, g, "f2")
	base := addFormat(t, g, "base", f1, nil)
	overlay := addFormat(t, g, "overlay", f2, base)
	tx := g.Begin(context.Background())
	defer tx.Abort()
	filter, err := tx.NewNode(&Options{Name: "filter", DriverName: "t", Kind: Filter, NeverFreeze: true})
	if err != nil {
		t.Fatal(err)
	}
	filter.SetDriver(&overDriver{n: filter})
	_, err = tx.InsertFilter(filter, "backing", base)
	_, errFreeze := tx.FreezeOverlays(filter)
	if err := errors.Join(err, errFreeze, tx.Publish(filter), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	_, err = g.FreezeChain(overlay, base)
	wantErr(t, err, "Cannot freeze 'backing' link to 'filter'")
	tx = g.Begin(context.Background())
	wantErr(t, tx.Replace(overlay.Backing(), base), "Cannot change frozen 'backing' link from 'overlay' to 'filter'")
	tx.Abort()
	tx = g.Begin(context.Background())
	defer tx.Abort()
	if err := errors.Join(tx.ThawOverlays(filter), tx.RemoveFilter(filter), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if overlay.Backing().Node() != base || overlay.Backing().Frozen() {
		t.Error("the filter has not gone, or the link is frozen still")
	}
}

func TestFreeze(t *testing.T) {
	g := newTestGraph(t)
	f1, f2, f3 := addMem(t, g, "f1"), addMem(t, g, "f2"), addMem(t, g, "f3")
	base := addFormat(t, g, "base", f1, nil)
	mid := addFormat(t, g, "mid", f2, base)
	top := addFormat(t, g, "top", f3, mid)
	unfreeze, err := g.FreezeChain(top, base)
	if err != nil {
		t.Fatal(err)
	}
	if !top.Backing().Frozen() || !mid.Backing().Frozen() {
		t.Error("not frozen")
	}
	_, err = g.FreezeChain(mid, nil)
	wantErr(t, err, "Cannot change 'backing' link from 'mid' to 'base'")
	tx := g.Begin(context.Background())
	defer tx.Abort()
	wantErr(t, tx.Detach(top.Backing()), "Cannot change frozen 'backing' link from 'top' to 'mid'")
	tx = g.Begin(context.Background())
	wantErr(t, tx.ReplaceNode(mid, base), "Cannot change 'backing' link to 'mid'")
	tx = g.Begin(context.Background())
	defer tx.Abort()
	unfreeze()
	unfreeze()
	if err := errors.Join(tx.ReplaceNode(mid, base), tx.Commit()); err != nil {
		t.Fatal(err)
	}
	if top.Backing().Node() != base {
		t.Error("not replaced")
	}
}
