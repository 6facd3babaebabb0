package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
)

// vhostConn is a front end of a vhost-user-blk export, with one split queue and a driver that is
// as simple as can be: slot i of what is under way always has the same indirect table, header,
// status and data. It sleeps while there is nothing to do, as a guest does.
type vhostConn struct {
	sock       int
	kick, call int // eventfds
	mem        []byte
	size       int64
	features   uint64

	avail uint16
	used  uint16
}

// The layout of the memory, in bytes. Its guest addresses are those of its mapping.
const (
	vhostQueue  = 256 // descriptors
	vhostDesc   = 0
	vhostAvail  = 4096
	vhostUsed   = 8192
	vhostSlots  = 16384 // slotSize for each slot: table, header, status
	slotSize    = 128
	slotHeader  = 64
	slotStatus  = 96
	vhostData   = 65536
	vhostMemory = vhostData + 64<<20
)

const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
)

// dialVhost connects to the export at path; what it shares is a file in dir.
func dialVhost(path, dir string) (c *vhostConn, err error) {
	c = &vhostConn{sock: -1, kick: -1, call: -1}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	s, err := dialUnix(path)
	if err != nil {
		return nil, err
	}
	c.sock = int(s)
	if err = s.timeout(20 * time.Second); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "guest")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err = errors.Join(os.Remove(f.Name()), f.Truncate(vhostMemory)); err != nil {
		return nil, err
	}
	const protection, flags = syscall.PROT_READ | syscall.PROT_WRITE, syscall.MAP_SHARED | syscall.MAP_POPULATE
	c.mem, err = syscall.Mmap(int(f.Fd()), 0, vhostMemory, protection, flags)
	if err != nil {
		return nil, err
	}
	for _, p := range []*int{&c.kick, &c.call} {
		fd, _, e := syscall.Syscall(syscall.SYS_EVENTFD2, 0, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
		if e != 0 {
			return nil, e
		}
		*p = int(fd)
	}
	return c, c.setUp(int(f.Fd()))
}

func (c *vhostConn) close() {
	for _, fd := range []int{c.sock, c.kick, c.call} {
		if fd >= 0 {
			syscall.Close(fd)
		}
	}
	if c.mem != nil {
		_ = syscall.Munmap(c.mem)
	}
}

// addr is the address of an offset in the memory, for the device.
func (c *vhostConn) addr(off int) uint64 { return uint64(uintptr(unsafe.Pointer(&c.mem[off]))) }

// setUp negotiates, shares the memory and starts the queue.
func (c *vhostConn) setUp(fd int) error {
	offered, err := c.number(vhostwire.GetFeatures)
	if err != nil {
		return err
	}
	const ours = virtio.FVersion1 | virtio.FIndirect | virtio.FEventIdx | virtio.BlkFFlush | virtio.BlkFConfigWCE
	c.features = offered & (ours | vhostwire.FProtocolFeatures)
	if c.features&virtio.FIndirect == 0 {
		return errors.New("the export has no indirect descriptors")
	}
	if _, err = c.number(vhostwire.GetProtocolFeatures); err != nil {
		return err
	}
	region := vhostwire.Region{Guest: c.addr(0), Size: vhostMemory, User: c.addr(0)}
	rings := vhostwire.Addr{Desc: c.addr(vhostDesc), Avail: c.addr(vhostAvail), Used: c.addr(vhostUsed)}
	for _, m := range []struct {
		m   vhostwire.Message
		fds []int
	}{
		{vhostwire.Message{Request: vhostwire.SetProtocolFeatures, Number: vhostwire.ProtoConfig}, nil},
		{vhostwire.Message{Request: vhostwire.SetOwner}, nil},
		{vhostwire.Message{Request: vhostwire.SetFeatures, Number: c.features}, nil},
		{vhostwire.Message{Request: vhostwire.SetMemTable, Regions: []vhostwire.Region{region}}, []int{fd}},
		{vhostwire.Message{Request: vhostwire.SetVringNum, State: vhostwire.State{Num: vhostQueue}}, nil},
		{vhostwire.Message{Request: vhostwire.SetVringBase}, nil},
		{vhostwire.Message{Request: vhostwire.SetVringAddr, Addr: rings}, nil},
		{vhostwire.Message{Request: vhostwire.SetVringCall}, []int{c.call}},
		{vhostwire.Message{Request: vhostwire.SetVringKick}, []int{c.kick}},
		{vhostwire.Message{Request: vhostwire.SetVringEnable, State: vhostwire.State{Num: 1}}, nil},
	} {
		if err := c.send(&m.m, m.fds...); err != nil {
			return err
		}
	}
	return c.capacity()
}

func (c *vhostConn) send(m *vhostwire.Message, fds ...int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	return syscall.Sendmsg(c.sock, m.Append(nil, 0), rights, nil, 0)
}

// ask sends a message and returns the payload of the reply.
func (c *vhostConn) ask(m *vhostwire.Message) ([]byte, error) {
	if err := c.send(m); err != nil {
		return nil, err
	}
	b := make([]byte, 512)
	for n := 0; ; {
		k, err := syscall.Read(c.sock, b[n:])
		if err != nil {
			return nil, err
		}
		if k == 0 {
			return nil, errors.New("the export closed the connection")
		}
		if n += k; n < vhostwire.HeaderSize {
			continue
		}
		if size := int(binary.NativeEndian.Uint32(b[8:])); n >= vhostwire.HeaderSize+size {
			return b[vhostwire.HeaderSize:n], nil
		}
	}
}

func (c *vhostConn) number(r vhostwire.Request) (uint64, error) {
	b, err := c.ask(&vhostwire.Message{Request: r})
	if err != nil || len(b) != 8 {
		return 0, fmt.Errorf("message %d: reply %x: %w", r, b, err)
	}
	return binary.NativeEndian.Uint64(b), nil
}

// capacity asks for the size of the disk.
func (c *vhostConn) capacity() error {
	b, err := c.ask(&vhostwire.Message{Request: vhostwire.GetConfig, Config: vhostwire.Config{Data: make([]byte, 60)}})
	if err != nil {
		return err
	}
	if len(b) < 12+8 {
		return errors.New("the export tells no configuration")
	}
	c.size = int64(binary.LittleEndian.Uint64(b[12:])) * 512
	return nil
}
