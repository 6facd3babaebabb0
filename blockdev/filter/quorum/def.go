package quorum

import (
	"errors"
	"strconv"
	"syscall"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// list is the option that has the copies, and what their edges are called, with their numbers.
const list = "children"

// Def describes the driver.
var Def = driver.Of(driver.Def[*types.BlockdevOptionsQuorum]{
	Name: types.BlockdevDriverQuorum, Kind: graph.Format, NoFolder: "quorum", List: list,
	Open: open, Check: check,
	Children: func(u *types.BlockdevOptionsQuorum) (l []driver.Child) {
		for i, ref := range u.Children {
			l = append(l, driver.Child{Name: edgeName(i), Role: perm.Data, Ref: ref})
		}
		return l
	},
	Strong: func(u *types.BlockdevOptionsQuorum, add func(name string, v value.Value)) {
		add("vote-threshold", u.VoteThreshold)
		driver.AddGiven(add, "blkverify", u.Blkverify)
		driver.AddGiven(add, "rewrite-corrupted", u.RewriteCorrupted)
		if u.ReadPattern != nil {
			add("read-pattern", string(*u.ReadPattern))
		}
	},
	ForImages: &driver.ForImages{
		Options: []string{"vote-threshold", "blkverify", "read-pattern"}, Hints: []string{"rewrite-corrupted"},
	},
})

func edgeName(i int) string { return list + "." + strconv.Itoa(i) }

// threshold is that of the options: QEMU keeps 32 bits of it.
func threshold(u *types.BlockdevOptionsQuorum) int { return int(int32(u.VoteThreshold)) }

// voting tells whether all copies are read.
func voting(u *types.BlockdevOptionsQuorum) bool {
	return types.Or(u.ReadPattern, types.QuorumReadPatternQuorum) == types.QuorumReadPatternQuorum
}

// check refuses options in QEMU's order. Two of them count only where all copies are read.
func check(u *types.BlockdevOptionsQuorum) error {
	verify := types.Or(u.Blkverify, false)
	switch n := threshold(u); {
	case len(u.Children) < 1:
		return errors.New("Number of provided children must be 1 or more")
	case n < 1:
		return errors.New("Parameter 'vote-threshold' expects a value >= 1")
	case n > len(u.Children):
		return errors.New("threshold may not exceed children count")
	case !voting(u) || !verify:
		return nil
	case len(u.Children) != 2 || n != 2:
		return errors.New("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
	case types.Or(u.RewriteCorrupted, false):
		return errors.New("rewrite-corrupted=on cannot be used with blkverify=on")
	}
	return nil
}

func open(x *driver.Opening, u *types.BlockdevOptionsQuorum) (graph.Driver, error) {
	d := &quorum{node: x.Node, threshold: threshold(u), fifo: !voting(u), next: len(u.Children)}
	if !d.fifo {
		d.verify, d.rewrite = types.Or(u.Blkverify, false), types.Or(u.RewriteCorrupted, false)
	}
	d.memory.Limit = memoryMax
	d.crew.init()
	copies := x.Node.Children()
	for _, e := range copies {
		if e.Size() != copies[0].Size() {
			return nil, blk.Errnof(syscall.EIO, "Could not refresh total sector count")
		}
	}
	return d, nil
}
