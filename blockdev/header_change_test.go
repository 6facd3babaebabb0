package blockdev

import (
	"errors"
	"log/slog"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/events/panics"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// header is an image whose header can be changed in one way or another.
type header struct {
	*drivertest.MemFile
	change func(name string) error
}

func (h header) BackingFile() (name, format string) { return "old", "raw" }

func (h header) CheckBackingFile(string, string) error { return nil }

func (h header) ChangeBackingFile(_ *blk.Req, name, _ string) error { return h.change(name) }

// TestHeaderChangeTakesBack: what a change that fails may have written is taken back. One that ends
// in a panic fails the node, and nothing is written any more.
func TestHeaderChangeTakesBack(t *testing.T) {
	defer panics.Contain()()
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for name, c := range map[string]struct {
		fail   func() error
		header string
		failed bool
	}{
		"error": {func() error { return syscall.EIO }, "old", false},
		"panic": {func() error { panic("bug") }, "new", true},
	} {
		t.Run(name, func(t *testing.T) {
			g, now := drivertest.NewGraph(t), "old"
			n := drivertest.AddNode(t, g, "n", header{drivertest.NewMemFile(512), func(name string) error {
				if now = name; name == "new" {
					return c.fail()
				}
				return nil
			}})
			tx := g.Begin(t.Context())
			defer tx.Abort()
			hold, err := g.HoldNodes(t.Context(), n)
			if err != nil {
				t.Fatal(err)
			}
			if err := tx.Drain(n); err != nil {
				t.Fatal(err)
			}
			tx.Join(&HeaderChange{Node: n, Name: "new"})
			if err := tx.Commit(); !errors.Is(err, syscall.EIO) {
				t.Errorf("the change: %v", err)
			}
			hold.Release()
			if now != c.header || n.Failed() != c.failed {
				t.Errorf("the header names %s, the node has failed: %v", now, n.Failed())
			}
			tx = g.Begin(t.Context())
			if err := errors.Join(tx.Delete(n.Name()), tx.Commit()); err != nil {
				t.Error(err)
			}
		})
	}
}

var _ graph.BackingChanger = header{}
