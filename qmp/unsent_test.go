package qmp

import "testing"

// What clients leave unread while others are being disconnected, after the last look at it, is
// looked at, too.
func TestRelieveAskedForMeanwhile(t *testing.T) {
	d := testDispatcher()
	u := &d.unsent
	u.tight.Store(1) // somebody has had that look
	u.bytes.Store(u.limit + 1)
	d.relieve()
	n := u.relieved(1)
	if n == 0 {
		t.Fatal("it is not")
	}
	if n = u.relieved(n); n != 0 {
		t.Errorf("asked for %d times more by nobody", n)
	}
}
