package copybeforewrite_test

import (
	"bytes"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// away is a target whose server may read what it is given later.
type away struct{ *drivertest.Fault }

func (a away) Caps() graph.Caps {
	c := a.Fault.Caps()
	c.Remote = true
	return c
}

// The kernel is given pages of the source for targets on this machine only: for a server they would
// be live, and the point in time would not hold for what it reads after the connection is lost.
func TestRemoteTargetGetsBytes(t *testing.T) {
	for _, remote := range []bool{false, true} {
		g := drivertest.NewGraph(t)
		file := drivertest.NewHostFile(t, 2*cluster)
		if err := file.WriteAt(&blk.Req{}, blk.Buf(bytes.Repeat([]byte{7}, 2*cluster)), 0, 0); err != nil {
			t.Fatal(err)
		}
		to := drivertest.NewFault(drivertest.NewHostFile(t, 2*cluster))
		copied := 0
		to.Hook(func(op drivertest.Op, _, _ int64) {
			if op == drivertest.OpCopy {
				copied++
			}
		})
		disk := drivertest.AddNode(t, g, "disk", file)
		var driver graph.Driver = to
		if remote {
			driver = away{to}
		}
		target := drivertest.AddNode(t, g, "target", driver)
		cbw := drivertest.MustBuild(t, g, drivertest.Spec{
			Options:  graph.Options{Name: "cbw", DriverName: copybeforewrite.DriverName, Kind: graph.Filter},
			Children: []drivertest.Child{drivertest.FilteredFile(disk), {Name: "target", Role: perm.Data, Node: target}},
			Open:     copybeforewrite.Def.With(&types.BlockdevOptionsCbw{}),
		})
		guest := drivertest.AddRoot(t, g, cbw, drivertest.Writer)
		if err := do(t, guest, func(r *blk.Req) error { return guest.WriteAt(r, blk.Buf([]byte("guest")), 512, 0) }); err != nil {
			t.Fatal(err)
		}
		if (copied > 0) == remote {
			t.Errorf("remote %v: %d copies by the kernel", remote, copied)
		}
		got := make([]byte, 2*cluster)
		if err := to.ReadAt(&blk.Req{}, blk.Buf(got), 0, 0); err != nil ||
			!bytes.Equal(got[:cluster], bytes.Repeat([]byte{7}, cluster)) {
			t.Errorf("remote %v: what was there is not in the target: %v", remote, err)
		}
	}
}
