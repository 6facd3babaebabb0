package blockdev

import (
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/transaction"
	"qblockd/schema/types"
)

// clinging is a file that cannot become read-only while it fails.
type clinging struct {
	graph.Driver
	fails *bool
}

func (c clinging) PrepareReadOnly(_ *blk.Req, readOnly bool) error {
	if readOnly && *c.fails {
		return syscall.ENOSPC
	}
	return nil
}

func (c clinging) CommitReadOnly(*blk.Req, bool) error { return nil }

func (c clinging) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return c.Driver.(graph.Writer).WriteAt(r, v, off, f)
}

func (c clinging) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return c.Driver.(graph.Zeroer).Zero(r, off, n, f)
}

// TestSnapshotOfClinging: a node that cannot be made read-only below its overlay takes no writers
// any more, and is recorded as read-only. One whose driver never can is as it was.
func TestSnapshotOfClinging(t *testing.T) {
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	dir, fails := t.TempDir(), true
	list := overridden("raw", func(was driver.OpenFunc, x *driver.Opening) (graph.Driver, error) {
		d, err := was(x)
		return clinging{d, &fails}, err
	})
	for _, reopens := range []bool{true, false} {
		m := newManager(t, Config{Drivers: list})
		writeFile(t, dir+"/a", strings.Repeat("a", 1<<20))
		below := `{'driver': 'raw', 'node-name': 'below', 'file': {'driver': 'file', 'filename': '` + dir + `/a'}}`
		if !reopens {
			below = `{'driver': 'copy-on-read', 'node-name': 'below', 'file': {'driver': 'null-co', 'size': 1048576}}`
		}
		mustAdd(t, m, below)
		create(t, dir+"/o", "", "")
		mustAdd(t, m, `{'driver': 'qcow2', 'node-name': 'over', 'backing': null, 'file': {'driver': 'file', 'filename': '`+dir+`/o'}}`)
		n := m.g.Node("below")
		err := transaction.Run(t.Context(), m.g, m.Snapshot(&types.BlockdevSnapshot{Node: "below", Overlay: "over"}))
		if err != nil || n.ReadOnly() {
			t.Fatalf("%v, read-only is %v", err, n.ReadOnly())
		}
		if graph.StateOf(n).ReadOnly != reopens {
			t.Errorf("recorded is %+v", graph.StateOf(n))
		}
		mustDel(t, m, "over") // which let nobody write to what is below it
		_, err = m.g.AddRoot(t.Context(), graph.RootSpec{EdgeName: "root", Claim: drivertest.Writer}, n)
		if !reopens {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if err == nil || err.Error() != "Node 'below' could not be made read-only below its overlay: No space left on device" {
			t.Errorf("a writer comes: %v", err)
		}
		if drivertest.AddRoot(t, m.g, n, drivertest.Reader); !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
		fails = false
		for _, ro := range []bool{true, false} {
			err := m.g.SwitchReadOnly(t.Context(), ro, graph.Now.WithFiles(n)...)
			if err != nil || graph.StateOf(n).ReadOnly != ro {
				t.Errorf("%v, recorded is %+v", err, graph.StateOf(n))
			}
		}
		drivertest.AddRoot(t, m.g, n, drivertest.Writer)
	}
}
