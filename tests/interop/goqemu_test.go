package interop

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"

	"qblockd/tests/daemon"
)

// TestGoQEMU drives the daemon with the QMP client that Go programs use.
func TestGoQEMU(t *testing.T) {
	dir := t.TempDir()
	d := daemon.Start(t, dir, "--blockdev", "null-co,node-name=n,size=1048576", "--export", "nbd,id=e,node-name=n")
	m, err := goqemu.NewSocketMonitor("unix", d.QMPSocket(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	defer m.Disconnect()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// The client delivers replies only while somebody takes its events.
	events := make(chan goqemu.Event, 16)
	go func() {
		for e := range stream {
			events <- e
		}
	}()
	raw, err := m.Run([]byte(`{"execute": "query-block-exports"}`))
	if err != nil {
		t.Fatal(err)
	}
	var reply struct {
		Return []struct {
			ID   string `json:"id"`
			Node string `json:"node-name"`
		} `json:"return"`
	}
	if err := json.Unmarshal(raw, &reply); err != nil || len(reply.Return) != 1 ||
		reply.Return[0].ID != "e" || reply.Return[0].Node != "n" {
		t.Errorf("exports: %s (%v)", raw, err)
	}
	if _, err := m.Run([]byte(`{"execute": "block-export-del", "arguments": {"id": "e"}}`)); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-events:
		if e.Event != "BLOCK_EXPORT_DELETED" || e.Data["id"] != "e" {
			t.Errorf("event: %+v", e)
		}
	case <-ctx.Done():
		t.Error("no event came")
	}
	if _, err := m.Run([]byte(`{"execute": "nope"}`)); err == nil {
		t.Error("an unknown command was accepted")
	}
	d.Stop(t)
}
