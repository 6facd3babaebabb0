package interop

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
	"qblockd/tests/daemon"
)

// TestVhostUserClient has QEMU 10's driver virtio-blk-vhost-user read and write what qblockd
// exports, and the node resized meanwhile.
func TestVhostUserClient(t *testing.T) {
	need(t, "qemu-img", "qemu-io10", "qemu-img10")
	dir := t.TempDir()
	sh(t, dir, "truncate -s 8M disk; head -c 8M /dev/urandom > want; cp want disk; qemu-img create -q -f qcow2 disk.qcow2 8M")
	d := daemon.Start(t, dir, "--blockdev", "file,node-name=n,filename=disk,discard=unmap",
		"--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2,discard=unmap",
		"--object", "iothread,id=io",
		"--export", "vhost-user-blk,id=v,node-name=n,writable=on,num-queues=2,addr.type=unix,addr.path=v.sock",
		"--export", "vhost-user-blk,id=w,node-name=q,writable=on,iothread=io,addr.type=unix,addr.path=w.sock")
	defer d.Stop(t)
	const disk = "--image-opts driver=virtio-blk-vhost-user,cache.direct=on,path="
	sh(t, dir, "qemu-img10 compare "+disk+"v.sock driver=raw,file.filename=want")
	for _, sock := range []string{"v.sock", "w.sock"} {
		sh(t, dir, "qemu-io10 %s%s -c 'write -P 7 1M 3M' -c 'read -P 7 1M 3M' -c 'write -z 1M 64k' -c 'read -P 0 1M 64k' -c flush "+
			"-c 'discard 2M 1M' -c 'read -P 0 2M 1M' -c 'aio_write -P 9 0 64k' -c 'aio_write -P 8 64k 4k' -c aio_flush "+
			"-c 'read -P 9 0 64k' -c 'read -P 8 64k 4k'", disk, sock)
	}
	q := d.Dial(t)
	q.Must(t, "block_resize", map[string]any{"node-name": "n", "size": 16 << 20})
	if out := sh(t, dir, "qemu-io10 %sv.sock -c length -c 'write -P 3 12M 1M' -c 'read -P 3 12M 1M'", disk); !strings.Contains(out, "16 MiB") {
		t.Errorf("after a resize: %s", out)
	}
	q.Must(t, "block-export-del", map[string]any{"id": "w"})
	q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "w"})
	q.Must(t, "blockdev-del", map[string]any{"node-name": "q"})
	sh(t, dir, "qemu-img check -q disk.qcow2 && qemu-io -f qcow2 -c 'read -P 9 0 64k' -c 'read -P 8 64k 4k' disk.qcow2")
	sh(t, dir, "qemu-img10 bench -c 2000 -d 32 -s 4096 -w --image-opts driver=virtio-blk-vhost-user,path=v.sock,cache.direct=on")
}

// TestVhostUserStorm has front ends come and go, at any point of what they have to say.
func TestVhostUserStorm(t *testing.T) {
	dir := t.TempDir()
	sh(t, dir, "truncate -s 8M disk")
	d := daemon.Start(t, dir, "--blockdev", "file,node-name=n,filename=disk",
		"--export", "vhost-user-blk,id=v,node-name=n,writable=on,num-queues=2,addr.type=unix,addr.path=v.sock")
	defer d.Stop(t)
	guest := virtiotest.NewGuest(t, 1<<20)
	driver := virtiotest.NewDriver(guest, 16, virtio.FEventIdx)
	events := []int{eventfd(t), eventfd(t)}
	rings := driver.Rings()
	script := []struct {
		m   vhostwire.Message
		fds []int
	}{
		{m: vhostwire.Message{Request: vhostwire.GetFeatures}},
		{m: vhostwire.Message{Request: vhostwire.SetFeatures, Number: virtio.FVersion1}},
		{vhostwire.Message{Request: vhostwire.SetMemTable, Regions: []vhostwire.Region{
			{Guest: guest.Base, User: guest.User, Size: uint64(len(guest.Mem))}}}, []int{guest.FD}},
		{m: vhostwire.Message{Request: vhostwire.SetVringNum, State: vhostwire.State{Num: 16}}},
		{m: vhostwire.Message{Request: vhostwire.SetVringAddr, Addr: vhostwire.Addr{
			Desc: rings.Desc, Avail: rings.Driver, Used: rings.Device}}},
		{vhostwire.Message{Request: vhostwire.SetVringCall}, events[:1]},
		{vhostwire.Message{Request: vhostwire.SetVringKick}, events[1:]},
		{m: vhostwire.Message{Request: vhostwire.GetVringBase}},
	}
	visit := func(n int) {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(dir, "v.sock")})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		for _, s := range script[:n] {
			var oob []byte
			if s.fds != nil {
				oob = unix.UnixRights(s.fds...)
			}
			b := s.m.Append(nil, 0)
			if n%2 == 1 && s.m.Request == script[n-1].m.Request {
				b = b[:len(b)-1] // cut short
			}
			if _, _, err := c.WriteMsgUnix(b, oob, nil); err != nil {
				t.Fatal(err)
			}
		}
		if n == len(script) {
			b := make([]byte, 2*vhostwire.HeaderSize+16)
			if _, err := io.ReadFull(c, b); err != nil || binary.NativeEndian.Uint32(b[20:]) != uint32(vhostwire.GetVringBase) {
				t.Fatalf("%x, %v", b, err)
			}
		}
	}
	rounds := 1000
	if testing.Short() {
		rounds = 100
	}
	d.LeavesNothing(t, func() {
		for i := range rounds {
			visit(i % (len(script) + 1))
		}
		visit(len(script)) // those before have gone
	})
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
