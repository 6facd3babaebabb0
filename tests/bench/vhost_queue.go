package main

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"qblockd/blockdev/virtio"
)

// word is 32 bits that the device changes, or looks at, at the same time.
func (c *vhostConn) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&c.mem[off])) }

// prepare writes what stays of the slots' requests.
func (c *vhostConn) prepare(w *workload) {
	le := binary.LittleEndian
	put := func(b []byte, addr uint64, n int, flags, next uint16) {
		le.PutUint64(b, addr)
		le.PutUint32(b[8:], uint32(n))
		le.PutUint16(b[12:], flags)
		le.PutUint16(b[14:], next)
	}
	typ, dataFlags := uint32(0), uint16(descNext|descWrite)
	if w.write {
		typ, dataFlags = 1, descNext
	}
	for i := range w.qd {
		at := vhostSlots + slotSize*i
		put(c.mem[at:], c.addr(at+slotHeader), 16, descNext, 1)
		put(c.mem[at+16:], c.addr(vhostData+w.bs*i), w.bs, dataFlags, 2)
		put(c.mem[at+32:], c.addr(at+slotStatus), 1, descWrite, 0)
		put(c.mem[vhostDesc+16*i:], c.addr(at), 3*16, descIndirect, 0)
		le.PutUint32(c.mem[at+slotHeader:], typ)
		copy(c.data(w, i), pattern(w.bs))
	}
}

func (c *vhostConn) data(w *workload, slot int) []byte { return c.mem[vhostData+w.bs*slot:][:w.bs] }

// issue makes the slot's request for off available, not yet shown.
func (c *vhostConn) issue(w *workload, slot int, off int64) {
	at := vhostSlots + slotSize*slot
	binary.LittleEndian.PutUint64(c.mem[at+slotHeader+8:], uint64(off)/512)
	c.mem[at+slotStatus] = 0xff
	if w.write {
		mark(c.data(w, slot), off)
	}
	binary.LittleEndian.PutUint16(c.mem[vhostAvail+4+2*int(c.avail%vhostQueue):], uint16(slot))
	c.avail++
}

// show makes available what was issued since the available index was old, and kicks if the device
// wants that.
func (c *vhostConn) show(old uint16) error {
	if c.avail == old {
		return nil
	}
	// The flags are 0 with event indices, and say that notifications are wanted without.
	atomic.StoreUint32(c.word(vhostAvail), uint32(c.avail)<<16)
	wanted := atomic.LoadUint32(c.word(vhostUsed))&1 == 0
	if c.features&virtio.FEventIdx != 0 {
		event := uint16(atomic.LoadUint32(c.word(vhostUsed + 4 + 8*vhostQueue)))
		wanted = c.avail-event-1 < c.avail-old
	}
	if !wanted {
		return nil
	}
	one := binary.NativeEndian.AppendUint64(nil, 1)
	_, err := syscall.Write(c.kick, one)
	return err
}

// sleep waits until something is used.
func (c *vhostConn) sleep() error {
	// The used event shares its word with nothing.
	atomic.StoreUint32(c.word(vhostAvail+4+2*vhostQueue), uint32(c.used))
	if c.usedIdx() != c.used {
		return nil
	}
	p := struct {
		fd              int32
		events, revents int16
	}{int32(c.call), pollIn, 0}
	n, _, e := syscall.Syscall(syscall.SYS_POLL, uintptr(unsafe.Pointer(&p)), 1, vhostPatience)
	if e != 0 && e != syscall.EINTR {
		return e
	}
	if n == 0 && e == 0 {
		return fmt.Errorf("no notification for %d ms; %d are under way, and %d used", vhostPatience, c.avail-c.used, c.usedIdx()-c.used)
	}
	var b [8]byte
	_, err := syscall.Read(c.call, b[:])
	if err == syscall.EAGAIN {
		err = nil
	}
	return err
}

const (
	pollIn        = 1
	vhostPatience = 10000 // milliseconds
)

func (c *vhostConn) usedIdx() uint16 { return uint16(atomic.LoadUint32(c.word(vhostUsed)) >> 16) }

// run keeps w.qd requests under way until stop, and returns how many were answered.
func (c *vhostConn) run(w workload, stop *atomic.Bool) (done int64, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c.prepare(&w)
	offs := make([]int64, w.qd)
	next := w.offsets(c.size, 0)
	old := c.avail
	for s := range w.qd {
		offs[s] = next()
		c.issue(&w, s, offs[s])
	}
	for left := w.qd; left > 0; {
		if err := c.show(old); err != nil {
			return done, err
		}
		old = c.avail
		now := c.usedIdx()
		if now == c.used {
			if err := c.sleep(); err != nil {
				return done, err
			}
			continue
		}
		for ; c.used != now; c.used++ {
			slot := int(binary.LittleEndian.Uint32(c.mem[vhostUsed+4+8*int(c.used%vhostQueue):]))
			if slot >= w.qd {
				return done, fmt.Errorf("the device used descriptor %d", slot)
			}
			if err := c.check(&w, slot, offs[slot]); err != nil {
				return done, err
			}
			if done++; stop.Load() {
				left--
				continue
			}
			offs[slot] = next()
			c.issue(&w, slot, offs[slot])
		}
	}
	return done, nil
}

// check looks at the answer to a request.
func (c *vhostConn) check(w *workload, slot int, off int64) error {
	if s := c.mem[vhostSlots+slotSize*slot+slotStatus]; s != 0 {
		return fmt.Errorf("status %d at %d", s, off)
	}
	if !w.verify {
		return nil
	}
	return marked(c.data(w, slot), off)
}

// driveVhost runs w for secs, and returns requests a second and what each cost process p in
// microseconds of processor time.
func driveVhost(c *vhostConn, p *proc, w workload, secs float64) (iops, cost float64, err error) {
	before, err := p.cpu()
	if err != nil {
		return 0, 0, err
	}
	var stop atomic.Bool
	begin := time.Now()
	timer := time.AfterFunc(time.Duration(secs*1e9), func() { stop.Store(true) })
	defer timer.Stop()
	n, err := c.run(w, &stop)
	took := time.Since(begin)
	after, err2 := p.cpu()
	if err == nil {
		err = err2
	}
	return float64(n) / took.Seconds(), (after - before) * 1e6 / float64(max(n, 1)), err
}
