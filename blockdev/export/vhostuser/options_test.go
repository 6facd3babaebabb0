package vhostuser

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/schema/types"
)

// Errors of the node are the guest's, or what the policy of the export says.
func TestErrors(t *testing.T) {
	fail := func(f *fixture) { f.disk.Inject(drivertest.Rule{Ops: drivertest.OpWrite, Count: 1, Err: unix.ENOSPC}) }
	f := newSlow(t)
	m := f.boot(1, virtio.BlkFFlush)
	fail(f)
	if s, _ := m.queues[0].do(reqOut, 0, make([]byte, 512), 512); s != 1 {
		t.Errorf("status %d", s)
	}

	stop := types.BlockdevOnErrorStop
	f = newSlow(t, func(o *types.BlockExportOptions) { o.XQblockdOnWriteError = &stop })
	m = f.boot(1, virtio.BlkFFlush)
	fail(f)
	q := m.queues[0]
	slot := q.put(reqOut, 0, make([]byte, 512), 512)
	eventually(t, "the export is stopped", func() bool {
		return *f.table.Query()[0].XQblockdIoStatus == types.BlockDeviceIoStatusNospace
	})
	if err := f.table.Resume("e"); err != nil {
		t.Fatal(err)
	}
	if done, s := q.used(); done != slot || s != 0 {
		t.Errorf("slot %d, status %d after the export went on", done, s)
	}
	// A ring that stops while the export is stopped does not wait for that: what has failed is tried
	// once more, and told.
	fail(f)
	slot = q.put(reqOut, 0, make([]byte, 512), 512)
	eventually(t, "the export is stopped", func() bool {
		return *f.table.Query()[0].XQblockdIoStatus == types.BlockDeviceIoStatusNospace
	})
	m.stop(q)
	if done, s := q.used(); done != slot || s != 0 {
		t.Errorf("slot %d, status %d", done, s)
	}
}

func TestOptions(t *testing.T) {
	f := newFixture(t)
	type options = types.BlockExportOptionsVhostUserBlk
	opts := func(c func(v *options)) func(*types.BlockExportOptions) {
		return func(o *types.BlockExportOptions) { c(o.U.(*options)) }
	}
	size := func(n uint64) func(*types.BlockExportOptions) {
		return opts(func(v *options) { v.LogicalBlockSize = &n })
	}
	for want, o := range map[string]func(*types.BlockExportOptions){
		"Property x.logical-block-size doesn't take value 100 (minimum: 512, maximum: 2097152)":     size(100),
		"Property x.logical-block-size doesn't take value 4194304 (minimum: 512, maximum: 2097152)": size(4 << 20),
		"Property x.logical-block-size doesn't take value '1536', it's not a power of 2":            size(1536),
		"num-queues must be greater than 0":                                                         opts(func(v *options) { v.NumQueues = new(uint16) }),
		"Only socket address types 'unix' and 'fd' are supported": opts(func(v *options) {
			v.Addr = types.SocketAddress{Type: types.SocketAddressTypeInet, U: &types.InetSocketAddress{}}
		}),
		"Failed to bind socket to /nonexistent-dir/v: No such file or directory": opts(func(v *options) {
			v.Addr.U = &types.UnixSocketAddress{Path: "/nonexistent-dir/v"}
		}),
	} {
		if err := f.add("x", o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if n := len(f.table.Query()); n != 1 {
		t.Errorf("%d exports", n)
	}
}

// A front end that takes no replies does not keep an export.
func TestDeafFrontEnd(t *testing.T) {
	f := newFixture(t)
	m := f.connect()
	flood := bytes.Repeat((&vhostwire.Message{Request: vhostwire.GetFeatures}).Append(nil, 0), 1000)
	m.c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	for {
		if _, err := m.c.Write(flood); err != nil {
			break // nobody reads any more: the export waits to be read itself
		}
	}
	if err := f.table.Del(t.Context(), "e", types.BlockExportRemoveModeSafe); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the export has gone", func() bool { return len(f.table.Query()) == 0 })
}
