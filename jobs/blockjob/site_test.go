package blockjob

import (
	"log/slog"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// stuck is an image that can become writable, but not read-only while it fails.
type stuck struct {
	*drivertest.MemFile
	fails *bool
}

func (s stuck) PrepareReadOnly(_ *blk.Req, readOnly bool) error {
	if readOnly && *s.fails {
		return syscall.ENOSPC
	}
	return nil
}

func (s stuck) CommitReadOnly(*blk.Req, bool) error { return nil }

// TestStaysWritable: a node that cannot be made read-only again takes no writers any more, until it
// can, but those of the next job; it goes on for those who read it, and who write to it already.
func TestStaysWritable(t *testing.T) {
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, written := range []bool{false, true} {
		g, fails := drivertest.NewGraph(t), true
		n := drivertest.MustBuild(t, g, drivertest.Spec{
			Options: graph.Options{Name: "n", Kind: graph.Protocol, ReadOnly: true, Reopens: true},
			Open:    drivertest.Opened(stuck{drivertest.NewMemFile(512), &fails}),
		})
		attach := func(c perm.Claim) (*graph.Root, error) {
			tx := g.Begin(t.Context())
			defer tx.Abort()
			r, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: c}, n)
			if err == nil {
				err = tx.Commit()
			}
			return r, err
		}
		restore, err := MakeWritable(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		drivertest.AddRoot(t, g, n, drivertest.Reader)
		if written {
			drivertest.AddRoot(t, g, n, drivertest.Writer)
		}
		restore()
		drivertest.AddRoot(t, g, n, drivertest.Reader)
		_, err = attach(drivertest.Writer)
		if written {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if err == nil || !strings.HasSuffix(err.Error(), "could not be made read-only again after a job: No space left on device") {
			t.Errorf("a writer comes: %v", err)
		}
		again, err := MakeWritable(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		w, err := attach(drivertest.Writer)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.CloseRoot(t.Context(), w); err != nil {
			t.Error(err)
		}
		if again(); !graph.WritersBarred(n) {
			t.Error("writers can come after the next job, which cannot make it read-only either")
		}
		if again, err = MakeWritable(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		fails = false
		if again(); !n.ReadOnly() || graph.WritersBarred(n) {
			t.Error("it is not read-only after a job that can make it so")
		}
		if err := g.SwitchReadOnly(t.Context(), false, n); err != nil { // as blockdev-reopen does
			t.Error(err)
		}
		if _, err := attach(drivertest.Writer); err != nil {
			t.Error(err)
		}
	}
}
