package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/schema/types"
)

// TestSecondQuickstart: who starts another one in the same folder is told so, even where the disk
// is free, and the sockets stay those of the first.
func TestSecondQuickstart(t *testing.T) {
	dir := t.TempDir()
	start := func() (*daemon, error) {
		d := newDaemon(processWide{socketMode: 0o600, limits: defaultLimits()})
		t.Cleanup(d.abandon)
		return d, d.quickstart(t.Context(), cmdline.Item{Arg: dir})
	}
	first, err := start()
	if err != nil {
		t.Fatal(err)
	}
	if err := first.exports.Del(t.Context(), "disk", types.BlockExportRemoveModeHard); err != nil {
		t.Fatal(err)
	}
	if err := first.nodes.Del(t.Context(), "disk"); err != nil {
		t.Fatal(err)
	}
	if _, err := start(); err == nil || !strings.HasPrefix(err.Error(), "a quickstart runs in '"+dir+"' already: ") {
		t.Fatal(err)
	}
	close(first.up)
	c, err := net.Dial("unix", filepath.Join(dir, "qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 5)
	if n, err := c.Read(b); string(b[:n]) != `{"QMP` {
		t.Errorf("%q, %v", b[:n], err)
	}
}
