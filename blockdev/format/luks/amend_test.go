package luks

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// changeKeys makes a change to an open disk.
func changeKeys(g *graph.Graph, n *graph.Node, force bool, o *types.BlockdevAmendOptionsLUKS) error {
	ctx := context.Background()
	x, err := Def.Amend(ctx, &driver.Amendment{Graph: g, Node: n, Force: force, Objects: known}, o)
	if err != nil {
		return err
	}
	defer x.End()
	return x.Do(ctx, func() {})
}

func adding(secret string) *types.BlockdevAmendOptionsLUKS {
	return &types.BlockdevAmendOptionsLUKS{
		State: types.QCryptoBlockLUKSKeyslotStateActive, NewSecret: &secret, IterTime: ptr(int64(0)),
	}
}

func erasing(secret string) *types.BlockdevAmendOptionsLUKS {
	return &types.BlockdevAmendOptionsLUKS{State: types.QCryptoBlockLUKSKeyslotStateInactive, OldSecret: &secret}
}

// opens tells whether an image opens with a secret.
func opens(t *testing.T, m *drivertest.MemFile, secret string) bool {
	t.Helper()
	g := drivertest.NewGraph(t)
	_, err := openIn(t, g, m.Clone(), &secret, true)
	if err != nil && err.Error() != "Invalid password, cannot unlock any keyslot" {
		t.Error(err)
	}
	return err == nil
}

// Keys come and go; the last one goes by force alone.
func TestAmend(t *testing.T) {
	m := newImage(t, options(64<<10))
	g := drivertest.NewGraph(t)
	n, err := openIn(t, g, m, ptr("one"), false)
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error, one, two bool) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
		if opens(t, m, "one") != one || opens(t, m, "two") != two {
			t.Error("the image opens with other passwords")
		}
	}
	check(changeKeys(g, n, false, adding("two")), true, true)
	check(changeKeys(g, n, false, erasing("one")), false, true)
	if err := changeKeys(g, n, false, erasing("two")); err == nil || !strings.HasPrefix(err.Error(), "All the active keyslots match") {
		t.Error(err)
	}
	check(changeKeys(g, n, true, erasing("two")), false, false)
}

// What says nothing of an erasure is refused in the reference's words, in its order.
func TestEraseRefused(t *testing.T) {
	m := newImage(t, options(64<<10))
	g := drivertest.NewGraph(t)
	n, err := openIn(t, g, m, ptr("one"), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := changeKeys(g, n, false, adding("two")); err != nil {
		t.Fatal(err)
	}
	o := erasing("two")
	o.NewSecret, o.IterTime, o.Secret = ptr("one"), ptr(int64(10)), ptr("one")
	for _, c := range []struct {
		name string
		next func() // leaves it out
	}{
		{"new-secret", func() { o.NewSecret = nil }},
		{"iter-time", func() { o.IterTime = nil }},
		{"secret", func() { o.Secret = nil }},
	} {
		want := "'" + c.name + "' must not be given when erasing keyslots"
		if err := changeKeys(g, n, true, o); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		if !opens(t, m, "two") {
			t.Error("a refused change erased a key")
		}
		c.next()
	}
	if err := changeKeys(g, n, false, o); err != nil || opens(t, m, "two") {
		t.Errorf("%v, and the erased key opens: %v", err, opens(t, m, "two"))
	}
}

// While keys change nobody else may read or write the file; then they may again.
func TestAmendClaims(t *testing.T) {
	m := newImage(t, options(64<<10))
	g := drivertest.NewGraph(t)
	n, err := openIn(t, g, m, ptr("one"), false)
	if err != nil {
		t.Fatal(err)
	}
	other := func() error {
		r, err := g.AddRoot(context.Background(), graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n.File().Node())
		if err == nil {
			err = g.CloseRoot(context.Background(), r)
		}
		return err
	}
	x, err := Def.Amend(context.Background(), &driver.Amendment{Graph: g, Node: n, Objects: known}, adding("two"))
	if err != nil {
		t.Fatal(err)
	}
	if err := other(); err == nil {
		t.Error("another writer while keys change")
	}
	x.End()
	if err := other(); err != nil {
		t.Error(err)
	}
	drivertest.AddRoot(t, g, n.File().Node(), perm.Claim{Need: perm.ConsistentRead, Share: perm.All})
	want := "Permission conflict on node 'file'"
	if err := changeKeys(g, n, false, adding("two")); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("keys change beside a reader: %v", err)
	}
	if err := other(); err != nil {
		t.Errorf("after a change that was refused: %v", err)
	}
}

// Whatever I/O fails, the image opens with the key that was not to be changed, and what queries
// show of the other is what is on disk.
func TestAmendFaults(t *testing.T) {
	for what, o := range map[string]*types.BlockdevAmendOptionsLUKS{"add": adding("two"), "erase": erasing("two")} {
		for i := 0; ; i++ {
			m := newImage(t, options(64<<10))
			f := drivertest.NewFault(m)
			g := drivertest.NewGraph(t)
			n, err := openIn(t, g, f, ptr("one"), false)
			if err != nil {
				t.Fatal(err)
			}
			if what == "erase" {
				if err := changeKeys(g, n, false, adding("two")); err != nil {
					t.Fatal(err)
				}
			}
			f.FailAt(i, syscall.EIO)
			err = changeKeys(g, n, false, o)
			if (f.Failed() > 0) != errors.Is(err, syscall.EIO) {
				t.Errorf("%s, call %d fails: %v", what, i, err)
			}
			if !opens(t, m, "one") {
				t.Errorf("%s, call %d fails: the other key is lost", what, i)
			}
			var info types.ImageInfo
			n.Driver().(graph.Informer).ImageInfo(&info)
			active := info.FormatSpecific.U.(*types.ImageInfoSpecificLUKSWrapper).Data.Slots[1].Active
			if opens(t, m, "two") && !active {
				t.Errorf("%s, call %d fails: an active slot is shown as inactive", what, i)
			}
			if f.Failed() == 0 {
				break
			}
		}
	}
}

// Whenever the power fails, the image opens with the key that was not to be changed, and one that
// was added is there in full or not at all.
func TestAmendCrash(t *testing.T) {
	image := newImage(t, options(64<<10))
	c := drivertest.CrashFileOf(image)
	g := drivertest.NewGraph(t)
	n, err := openIn(t, g, c, ptr("one"), false)
	if err != nil {
		t.Fatal(err)
	}
	var after []*drivertest.MemFile
	c.After(func(i int) {
		for seed := range uint64(3) {
			after = append(after, c.CrashLocked(uint64(i)*3+seed))
		}
	})
	add := adding("two")
	add.Keyslot = ptr(int64(6)) // lies in two sectors of the header
	if err := changeKeys(g, n, false, add); err != nil {
		t.Fatal(err)
	}
	if err := changeKeys(g, n, false, erasing("two")); err != nil {
		t.Fatal(err)
	}
	c.After(nil)
	if len(after) < 3*8 {
		t.Errorf("%d states only", len(after))
	}
	for i, m := range after {
		if !opens(t, m, "one") {
			t.Errorf("state %d: the other key is lost", i)
		}
	}
}
