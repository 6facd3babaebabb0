package copybeforewrite

import (
	"syscall"
	"testing"

	"qblockd/graph/bitmap"
)

// What is being copied is not over: it may fail, and is to do again then.
func TestOver(t *testing.T) {
	s := State{
		cluster: minCluster, pending: bitmap.New(minCluster, minCluster), done: bitmap.New(minCluster, minCluster),
		copies: map[*running]struct{}{},
	}
	if !s.Over() {
		t.Error("there is nothing to do")
	}
	s.pending.SetAll()
	for _, err := range []error{syscall.EIO, nil} {
		if s.Over() {
			t.Error("over with a cluster to do")
		}
		c, _ := s.take(0, minCluster, minCluster)
		if s.Over() {
			t.Error("over with a cluster that is being copied")
		}
		s.release(c, err, nil)
	}
	if !s.Over() {
		t.Error("all is copied")
	}
}
