package vhostuser

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
)

// answer is what a message is answered: the zero value is "done", which is told only to who asks.
type answer struct {
	bytes  []byte // the reply
	fd     int    // goes with it and is closed then; valid if there are bytes and withFD
	withFD bool
}

// message carries out the one that was read, and answers it. An error ends the connection: the
// state of the device is what it was, or nothing that could go on.
func (f *front) message(h vhostwire.Header) error {
	a, err := f.handle(&f.ch.msg)
	if a.withFD {
		defer unix.Close(a.fd)
	}
	switch {
	case a.bytes != nil && a.withFD:
		return f.ch.reply(a.bytes, a.fd)
	case a.bytes != nil:
		return f.ch.reply(a.bytes, -1)
	case h.NeedReply() && f.protocol&vhostwire.ProtoReplyAck != 0:
		var code uint64
		if err != nil {
			code = 1
		}
		err = errors.Join(err, f.ch.reply(vhostwire.AppendNumber(f.ch.out[:0], h.Request, code), -1))
	}
	return err
}

// handle carries a message out.
func (f *front) handle(m *vhostwire.Message) (a answer, err error) {
	number := func(n uint64) (answer, error) {
		return answer{bytes: vhostwire.AppendNumber(f.ch.out[:0], m.Request, n)}, nil
	}
	switch m.Request {
	case vhostwire.GetFeatures:
		return number(f.s.features)
	case vhostwire.SetFeatures:
		return a, f.setFeatures(m.Number)
	case vhostwire.GetProtocolFeatures:
		return number(protocol)
	case vhostwire.SetProtocolFeatures:
		return a, f.setProtocol(m.Number)
	case vhostwire.SetOwner:
		return a, nil
	case vhostwire.GetQueueNum:
		return number(uint64(f.s.queues))
	case vhostwire.GetMaxMemSlots:
		return number(maxSlots)
	case vhostwire.SetMemTable, vhostwire.AddMemReg, vhostwire.RemMemReg:
		return a, f.setMemory(m)
	case vhostwire.SetBackendReqFD:
		f.back.set(f.ch.fds.take())
		return a, nil
	case vhostwire.GetConfig, vhostwire.SetConfig:
		return f.config(m)
	case vhostwire.GetInflightFD, vhostwire.SetInflightFD:
		return f.inflightMessage(m)
	case vhostwire.SetLogBase, vhostwire.SetLogFD:
		return f.logMessage(m)
	case vhostwire.ResetOwner, vhostwire.ResetDevice:
		f.stopRings()
		return a, nil
	case vhostwire.SetStatus:
		if f.status = m.Number; f.status == 0 {
			f.stopRings()
		}
		return a, nil
	case vhostwire.GetStatus:
		return number(f.status)
	}
	return f.ringMessage(m)
}

func (f *front) setFeatures(n uint64) error {
	if extra := n &^ f.s.features; extra != 0 {
		return fmt.Errorf("features %#x were not offered", extra)
	}
	f.features = n
	f.logChanged()
	if n&vhostwire.FProtocolFeatures != 0 {
		return nil
	}
	for i := range f.rings {
		if r, err := f.ring(uint32(i)); err != nil {
			return err
		} else if err := r.enable(true); err != nil {
			return err
		}
	}
	return nil
}

func (f *front) setProtocol(n uint64) error {
	if extra := n &^ protocol; extra != 0 {
		return fmt.Errorf("protocol features %#x were not offered", extra)
	}
	f.protocol = n
	return nil
}

// setMemory makes another table of memory. Rings and requests use the one before until they are
// told, or have ended.
func (f *front) setMemory(m *vhostwire.Message) error {
	var err error
	switch m.Request {
	case vhostwire.SetMemTable:
		err = f.mem.replace(m.Regions, &f.ch.fds)
	case vhostwire.AddMemReg:
		err = f.mem.add(m.Regions[0], f.ch.fds.take())
	default:
		err = f.mem.remove(m.Regions[0])
	}
	if err != nil {
		return err
	}
	return f.memoryChanged()
}

// config reads or writes the configuration space.
func (f *front) config(m *vhostwire.Message) (a answer, err error) {
	c := &m.Config
	if m.Request == vhostwire.SetConfig {
		return a, f.s.setConfig(c.Offset, c.Data)
	}
	space := f.s.device.config()
	var reply *vhostwire.Config // nil: there is no such part
	if off, n := uint64(c.Offset), uint64(len(c.Data)); n > 0 && off+n <= uint64(len(space)) {
		reply = &vhostwire.Config{Offset: c.Offset, Flags: c.Flags, Data: space[off : off+n]}
	}
	return answer{bytes: vhostwire.AppendConfig(f.ch.out[:0], reply)}, nil
}

// inflightMessage makes the area for requests that are under way, or takes it back from a front end
// that has kept it.
func (f *front) inflightMessage(m *vhostwire.Message) (a answer, err error) {
	i := m.Inflight
	if m.Request == vhostwire.GetInflightFD {
		fd, err := newInflight(&i)
		if err != nil {
			return a, err
		}
		return answer{vhostwire.AppendInflight(f.ch.out[:0], &i), fd, true}, nil
	}
	for _, r := range f.rings {
		if r != nil && r.running() {
			return a, fmt.Errorf("queue %d is in use", r.index)
		}
	}
	fd := f.ch.fds.take()
	defer unix.Close(fd)
	return a, f.inflight.set(fd, i)
}

// logMessage says where what is written is to be logged, or how that is told.
func (f *front) logMessage(m *vhostwire.Message) (a answer, err error) {
	fd := f.ch.fds.take()
	if m.Request == vhostwire.SetLogFD {
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return a, err
		}
		f.log.setFD(fd)
		return a, nil
	}
	defer unix.Close(fd)
	before, err := f.log.set(fd, m.Log)
	if err != nil {
		return a, err
	}
	f.logChanged()
	if before != nil {
		before.Release()
	}
	return answer{bytes: vhostwire.AppendNumber(f.ch.out[:0], m.Request, 0)}, nil
}

// ringMessage carries out a message about one ring.
func (f *front) ringMessage(m *vhostwire.Message) (a answer, err error) {
	index := m.State.Index
	switch m.Request {
	case vhostwire.SetVringAddr:
		index = m.Addr.Index
	case vhostwire.SetVringKick, vhostwire.SetVringCall, vhostwire.SetVringErr:
		index = uint32(m.Number & vhostwire.RingIndexMask)
	}
	r, err := f.ring(index)
	if err != nil {
		return a, err
	}
	switch m.Request {
	case vhostwire.SetVringNum:
		if m.State.Num > virtio.MaxQueueSize {
			return a, fmt.Errorf("queue %d of size %d", index, m.State.Num)
		}
		return a, r.change(func() { r.size = int(m.State.Num) })
	case vhostwire.SetVringAddr:
		return a, r.setAddr(m.Addr)
	case vhostwire.SetVringBase:
		return a, r.change(func() { r.base = m.State.Num })
	case vhostwire.GetVringBase:
		base := r.stop()
		return answer{bytes: vhostwire.AppendState(f.ch.out[:0], m.Request, vhostwire.State{Index: index, Num: base})}, nil
	case vhostwire.SetVringEnable:
		return a, r.enable(m.State.Num != 0)
	case vhostwire.SetVringKick:
		if m.Number&vhostwire.RingNoFD != 0 {
			return a, fmt.Errorf("queue %d is to be polled for requests, which is not supported", index)
		}
		return a, r.setKick(f.ch.fds.take())
	case vhostwire.SetVringCall, vhostwire.SetVringErr:
		fd := -1
		if m.Number&vhostwire.RingNoFD == 0 {
			fd = f.ch.fds.take()
		}
		return a, r.setNotifier(m.Request, fd)
	}
	return a, errors.New("not expected")
}
