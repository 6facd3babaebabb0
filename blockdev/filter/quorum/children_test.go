package quorum

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// change adds a node as a copy, or takes out the one of that name.
func (c *copies) change(child string, node *graph.Node) error {
	d := c.node.Driver().(graph.ChildChanger)
	return c.g.Do(context.Background(), func(tx *graph.Tx) error {
		if node != nil {
			return d.AddChild(tx, node)
		}
		return d.RemoveChild(tx, tx.Child(c.node, child))
	})
}

// names are those of the copies' edges, in their order.
func (c *copies) names() string {
	var l []string
	for _, e := range c.node.Children() {
		l = append(l, strings.TrimPrefix(e.ChildName(), list+"."))
	}
	slices.Reverse(l)
	return strings.Join(l, " ")
}

// TestChildren: numbers go up, and only the last one is given again; a recorder hears of the edges
// alone, and what it refuses has not happened; sizes agree.
func TestChildren(t *testing.T) {
	c := newCopies(t, 2, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 1})
	spare := func(name string, size int64) *graph.Node {
		return drivertest.AddNode(t, c.g, name, drivertest.NewMemFile(size))
	}
	a, b, small := spare("a", 1<<20), spare("b", 1<<20), spare("small", 1<<19)
	var told []string
	var refuse error
	c.g.SetRecorder(func(l []graph.Change) error {
		for _, x := range l {
			told = append(told, fmt.Sprint(x.Key, " ", x.Value))
		}
		return refuse
	})
	defer c.g.SetRecorder(nil)
	for _, s := range []struct {
		child      string
		node       *graph.Node
		err, names string
	}{
		{"", small, "Node 'small' has 524288 bytes, and 'q' has 1048576", "0 1"},
		{"", a, "", "0 1 2"},
		{"children.1", nil, "", "0 2"},
		{"", b, "", "0 2 3"},
		{"children.3", nil, "", "0 2"},
		{"", b, "", "0 2 3"},
		{"children.0", nil, "", "2 3"},
		{"children.3", nil, "", "2"},
		{"children.2", nil, "The number of children cannot be lower than the vote threshold 1", "2"},
		{"", b, "", "2 3"},
	} {
		told = nil
		err := c.change(s.child, s.node)
		if got := c.names(); got != s.names || err == nil && s.err != "" || err != nil && err.Error() != s.err {
			t.Errorf("%+v: %v, names %s", s, err, got)
		}
		want := 1
		if s.err != "" {
			want = 0
		}
		if len(told) != want || want == 1 && !strings.HasPrefix(told[0], "node q.children.") {
			t.Errorf("%+v: recorded %q", s, told)
		}
	}
	refuse = errors.New("no")
	if err := c.change("children.3", nil); !errors.Is(err, refuse) || c.names() != "2 3" {
		t.Errorf("refused by the recorder: %v, names %s", err, c.names())
	}
	refuse = nil
	if err := errors.Join(c.change("children.3", nil), c.change("", b)); err != nil || c.names() != "2 3" {
		t.Errorf("after a refusal: %v, names %s", err, c.names())
	}
}

// TestChildrenUnderLoad: copies come and go under a guest, who does not notice; the one that stays
// has all that was written.
func TestChildrenUnderLoad(t *testing.T) {
	const size = 1 << 20
	c := newCopies(t, 3, size, types.BlockdevOptionsQuorum{VoteThreshold: 2, RewriteCorrupted: new(true)})
	spare := drivertest.AddNode(t, c.g, "spare", drivertest.NewMemFile(size))
	root := drivertest.AddRoot(t, c.g, c.node, drivertest.Writer)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range int64(3) {
		wg.Go(func() {
			for i := int64(0); ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				r, err := root.Begin(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				g, off := guest{root, r}, w<<18+i%16<<13
				err = g.WriteAt(r, blk.Buf(slices.Repeat([]byte{byte(i)}, 8192)), off, 0)
				b, e := g.read(off, 8192)
				root.End(r)
				if err = errors.Join(err, e); err != nil || b[0] != byte(i) || b[8191] != byte(i) {
					t.Errorf("writer %d, round %d: %v, %d", w, i, err, b[0])
					return
				}
			}
		})
	}
	for range 50 {
		if err := c.change("", spare); err != nil {
			t.Error(err)
		}
		if err := c.change("children.3", nil); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	c.equal(t)
}

// TestCanReplace: a copy that nobody else uses can be replaced, and nothing else.
func TestCanReplace(t *testing.T) {
	c := newCopies(t, 3, 1<<20, types.BlockdevOptionsQuorum{VoteThreshold: 2})
	d := c.node.Driver().(graph.ChildReplacer)
	drivertest.AddRoot(t, c.g, c.g.Node("c1"), drivertest.Reader)
	other := drivertest.AddNode(t, c.g, "other", drivertest.NewMemFile(512))
	got := []bool{d.CanReplace(c.g.Node("c0")), d.CanReplace(c.g.Node("c1")), d.CanReplace(other), d.CanReplace(c.node)}
	if want := []bool{true, false, false, false}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
