package blockdev

import (
	"runtime"
	"testing"
	"time"

	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
)

// TestRecordsGoWithNodes: nothing is kept of nodes that are gone, also where nobody asks for
// others: not what queries show of them, nor what their drivers held.
func TestRecordsGoWithNodes(t *testing.T) {
	m := newManager(t, Config{})
	gone := make(chan struct{}, 2)
	func() {
		mustAdd(t, m, `{'driver': 'raw', 'node-name': 'n', 'file': {'driver': 'null-co', 'size': 65536}}`)
		namedNodes(m, false)
		for _, n := range m.Graph().Nodes() {
			runtime.AddCleanup(n, func(c chan struct{}) { c <- struct{}{} }, gone)
		}
		if err := m.Del(t.Context(), "n"); err != nil {
			t.Fatal(err)
		}
	}()
	for end, left := time.Now().Add(20*time.Second), 2; ; {
		runtime.GC()
		select {
		case <-gone:
			left--
		case <-time.After(time.Millisecond):
		}
		m.records.mu.RLock()
		n := len(m.records.of)
		m.records.mu.RUnlock()
		switch {
		case left == 0 && n == 0:
			return
		case time.Now().After(end):
			t.Fatalf("%d nodes that were removed, and %d records, are kept", left, n)
		}
	}
}

// A Manager that nobody uses any more goes with its nodes, also with those that others define and
// that were never removed.
func TestManagersGo(t *testing.T) {
	gone := make(chan struct{}, 1)
	func() {
		g := graph.New(&drivertest.Sink{})
		m := New(g, Config{Drivers: drivers.All})
		mustAdd(t, m, `{'driver': 'raw', 'node-name': 'n', 'file': {'driver': 'null-co', 'size': 65536}}`)
		namedNodes(m, false)
		runtime.AddCleanup(g.Node("n"), func(c chan struct{}) { c <- struct{}{} }, gone)
		if err := g.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}()
	for end := time.Now().Add(20 * time.Second); ; {
		runtime.GC()
		select {
		case <-gone:
			return
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatal("a manager that nobody uses is kept")
		}
	}
}
