package file

import (
	"testing"

	"qblockd/graph/blk"
)

// TestWriteBehind: write-back starts for what jobs write, each so many bytes, one at a time; never
// for guests, and not where nothing is to reach the medium.
func TestWriteBehind(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		s    settings
		req  blk.Req
		want bool
	}{
		{"job", settings{}, blk.Req{Job: true}, true},
		{"guest", settings{}, blk.Req{}, false},
		{"no-flush", settings{noFlush: true}, blk.Req{Job: true}, false},
	} {
		c.s.name = mustFile(t, dir, c.name, 64<<20)
		d := mustOpen(t, c.s)
		if d.memory {
			t.Skip("SKIPPED: the directory for temporary files is in memory")
		}
		started, release := make(chan struct{}, 100), make(chan struct{})
		d.writeBack = func(int) { started <- struct{}{}; <-release }
		b := make([]byte, 1<<20)
		for off := int64(0); off < 40<<20; off += int64(len(b)) {
			if err := d.WriteAt(&c.req, blk.Buf(b), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		if !c.want {
			if len(started) > 0 || d.behind.busy.Load() {
				t.Errorf("%s: write-back was started", c.name)
			}
			close(release)
			continue
		}
		<-started
		if len(started) > 0 {
			t.Errorf("%s: several at once", c.name)
		}
		close(release)
		if err := d.Close(); err != nil { // the descriptor stays until it is over
			t.Fatal(err)
		}
	}
}
