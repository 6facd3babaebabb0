package file

import (
	"os"
	"path/filepath"
	"testing"

	"qblockd/graph"
	"qblockd/schema/types"
)

// Queries of a file do not meet a reopen of it (for the race detector).
func TestQueriesBesideReopen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := openDisk(t.Context(), settings{name: name, driver: "file"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if d.DriverStats().Driver != types.BlockdevDriverFile || !d.Caps().ZeroInit {
				t.Error("not what the file is")
			}
			if _, err := d.ActualSize(); err != nil {
				t.Error(err)
			}
		}
	}()
	for i := range 200 {
		p, err := reopen(d, &types.BlockdevOptionsFile{Filename: name}, &graph.Options{AutoReadOnly: true, NoFlush: i%2 == 0})
		if err == nil {
			err = p.Prepare(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		p.Commit()
		if !d.auto || d.noFlush != (i%2 == 0) || d.next != nil {
			t.Error("not reopened")
		}
	}
	close(stop)
	<-stopped
}
