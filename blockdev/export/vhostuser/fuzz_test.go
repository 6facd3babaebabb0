package vhostuser

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio/virtiotest"
)

// A front end says anything, with any descriptors, above a guest whose memory has anything in it.
// The export goes on: the next front end is served.
func FuzzFrontEnd(f *testing.F) {
	x := newFixture(f)
	guest := virtiotest.NewGuest(f, 1<<20)
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { unix.Close(event) })
	fds := []int{guest.FD, event, guest.FD, event, unix.Stdin}
	boot := []vhostwire.Message{
		{Request: vhostwire.SetProtocolFeatures, Number: protocol},
		{Request: vhostwire.SetFeatures, Number: 1 << 32},
		{Request: vhostwire.SetMemTable, Regions: []vhostwire.Region{{Guest: 0, User: 0, Size: 1 << 20}}},
		{Request: vhostwire.SetVringNum, State: vhostwire.State{Num: 16}},
		{Request: vhostwire.SetVringAddr, Addr: vhostwire.Addr{Desc: 0, Used: 4096, Avail: 8192}},
		{Request: vhostwire.SetVringKick},
		{Request: vhostwire.GetVringBase},
	}
	var seed []byte
	for i := range boot {
		b := boot[i].Append(nil, vhostwire.FlagNeedReply)
		kind := byte(0)
		switch boot[i].Request {
		case vhostwire.SetMemTable:
			kind = 1
		case vhostwire.SetVringKick:
			kind = 2
		}
		seed = append(append(seed, kind, byte(len(b))), b...)
	}
	f.Add(seed, []byte("descriptors"))
	f.Fuzz(func(t *testing.T, script, memory []byte) {
		copy(guest.Mem, memory)
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: x.path})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		for len(script) >= 2 {
			kind, n := int(script[0])%(len(fds)+1), min(int(script[1]), len(script)-2)
			b := script[2 : 2+n]
			script = script[2+n:]
			var oob []byte
			if kind > 0 {
				oob = unix.UnixRights(fds[kind-1])
			}
			if _, _, err := c.WriteMsgUnix(b, oob, nil); err != nil {
				break // dropped
			}
		}
		c.CloseWrite()
		again, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: x.path})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		again.SetDeadline(time.Now().Add(patience))
		if m := (&machine{t: t, c: again}); m.number(vhostwire.GetFeatures) == 0 {
			t.Error("no features")
		}
	})
}
