package graph

import "runtime"

// For the tests of package graph_test.
const RaceEnabled = raceEnabled

// AwaitRegistered waits until k requests are registered on n, those that wait for others included.
func AwaitRegistered(n *Node, k int) {
	for {
		t, got := &n.io.track, 0
		t.lockAll(false)
		for i := range t.shards {
			for c := t.shards[i].head; c != nil; c = c.next {
				got++
			}
		}
		t.unlockAll()
		if got == k {
			return
		}
		runtime.Gosched()
	}
}
