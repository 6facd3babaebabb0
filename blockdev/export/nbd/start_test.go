package nbd

import (
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/schema/types"
)

// TestStartHandshake: the time for a handshake is what the client of the daemon says, or else what
// the daemon was told; 0 is no limit.
func TestStartHandshake(t *testing.T) {
	table := export.New(drivertest.NewGraph(t), export.Options{})
	typ := NewType(table, Options{Handshake: 7 * time.Second})
	defer typ.Close()
	for _, c := range []struct {
		given *uint32
		want  time.Duration
	}{{nil, 7 * time.Second}, {new(uint32(3)), 3 * time.Second}, {new(uint32(0)), -1}} {
		o := &types.NbdServerOptions{HandshakeMaxSeconds: c.given, Addr: types.SocketAddress{
			Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: t.TempDir() + "/s"}}}
		if err := typ.Start(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if d := typ.running().opts.Handshake; d != c.want {
			t.Errorf("%v, want %v", d, c.want)
		}
		if err := typ.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
