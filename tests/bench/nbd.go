package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
)

const exportName = "x"

// nbdConn is one connection, used by one goroutine. What is to be sent is gathered in out and
// leaves before the connection would wait for replies.
type nbdConn struct {
	fd      fd             // unless under is set
	under   *tlscreds.Conn // TLS
	size    int64
	in      []byte // [r:w) is received and not used
	r, w    int
	out     []byte
	payload []byte // of a large read
}

// small is up to which length payloads go through the buffers; longer ones are moved without a copy
// in between.
const small = 32 << 10

func dialNBD(path string) (*nbdConn, error) {
	s, err := dialUnix(path)
	if err != nil {
		return nil, err
	}
	c := &nbdConn{fd: s, in: make([]byte, 256<<10)}
	if err = s.timeout(20 * time.Second); err == nil {
		err = c.handshake()
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *nbdConn) close() {
	if c.under != nil {
		c.under.Close()
		return
	}
	syscall.Close(int(c.fd))
}

func (c *nbdConn) handshake() error {
	if _, err := c.take(18); err != nil {
		return err
	}
	c.out = binary.BigEndian.AppendUint32(c.out, 3) // fixed newstyle, no zeroes
	return c.choose()
}

// choose asks for the export.
func (c *nbdConn) choose() error {
	c.out = nbdwire.AppendOption(c.out, nbdwire.OptStructuredReply, nil)
	c.out = nbdwire.AppendOption(c.out, nbdwire.OptGo, (&nbdwire.InfoRequest{Name: exportName}).Append(nil))
	for {
		h, err := c.take(nbdwire.OptReplySize)
		if err != nil {
			return err
		}
		r, err := nbdwire.ParseOptReply(h)
		if err != nil {
			return err
		}
		d, err := c.take(int(r.Len))
		switch {
		case err != nil:
			return err
		case r.Opt == nbdwire.OptStructuredReply:
			// With or without: each reply says what it is.
		case r.Type == nbdwire.RepInfo:
			if i, err := nbdwire.ParseInfo(d); err == nil && i.Type == nbdwire.InfoExport {
				c.size = int64(i.Size)
			}
		case r.Type == nbdwire.RepAck:
			return nil
		case r.Type>>31 != 0:
			return fmt.Errorf("export refused: %#x %s", r.Type, d)
		}
	}
}

// flush sends what is gathered.
func (c *nbdConn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.stream().Write(c.out)
	c.out = c.out[:0]
	return err
}

func (c *nbdConn) stream() io.ReadWriter {
	if c.under != nil {
		return c.under
	}
	return c.fd
}

// take returns the next n bytes, to be used before the next call.
func (c *nbdConn) take(n int) ([]byte, error) {
	if c.w-c.r < n {
		if err := c.flush(); err != nil {
			return nil, err
		}
		if c.r == c.w || len(c.in)-c.r < n {
			c.w = copy(c.in, c.in[c.r:c.w])
			c.r = 0
		}
		for c.w-c.r < n {
			k, err := c.stream().Read(c.in[c.w:])
			if err != nil {
				return nil, err
			}
			c.w += k
		}
	}
	b := c.in[c.r : c.r+n]
	c.r += n
	return b, nil
}

// takeLarge receives n bytes into c.payload; with the last of them what follows goes to c.in, so
// that a reply takes no read of its own for its head.
func (c *nbdConn) takeLarge(n int) ([]byte, error) {
	if len(c.payload) < n {
		c.payload = make([]byte, n)
	}
	b := c.payload[:n]
	k := copy(b, c.in[c.r:c.w])
	c.r += k
	if k == n {
		return b, nil
	}
	c.r, c.w = 0, 0
	if err := c.flush(); err != nil {
		return nil, err
	}
	if c.under != nil {
		_, err := io.ReadFull(c.under, b[k:])
		return b, err
	}
	for k < n {
		m, err := c.vector(syscall.SYS_READV, b[k:], c.in[:4096])
		if err != nil {
			return nil, err
		}
		if m == 0 {
			return nil, errors.New("server closed the connection")
		}
		if k += m; k > n {
			c.w = k - n
		}
	}
	return b, nil
}

// vector is readv or writev with two buffers.
func (c *nbdConn) vector(call uintptr, x, y []byte) (int, error) {
	iov := [2]syscall.Iovec{{Base: &x[0], Len: uint64(len(x))}, {Base: &y[0], Len: uint64(len(y))}}
	for {
		n, _, e := syscall.Syscall(call, uintptr(c.fd), uintptr(unsafe.Pointer(&iov)), 2)
		if e == syscall.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), nil
	}
}

// sendLarge sends what is gathered and then data.
func (c *nbdConn) sendLarge(data []byte) error {
	if c.under != nil {
		_, err := c.under.WriteVec(net.Buffers{c.out, data})
		c.out = c.out[:0]
		return err
	}
	n, err := c.vector(syscall.SYS_WRITEV, c.out, data)
	if err != nil {
		return err
	}
	h := len(c.out)
	c.out = c.out[:0]
	if n < h {
		if _, err = c.fd.Write(c.out[n:h]); err != nil {
			return err
		}
		n = h
	}
	_, err = c.fd.Write(data[n-h:])
	return err
}

// workload is what is asked of an export.
type workload struct {
	write  bool
	random bool
	bs     int // bytes a request
	qd     int // requests under way on each connection
	conns  int
	stride int64 // alignment of random offsets; 0: bs
	verify bool  // data read must be the pattern
}

// offsets returns a function for the offsets of the requests of connection id, one after the other,
// on a disk of that size.
func (w *workload) offsets(size int64, id int) func() int64 {
	stride := max(w.stride, int64(w.bs))
	base, region := int64(0), size/stride*stride
	if !w.random {
		region = size / int64(max(w.conns, 1)) / stride * stride
		base = int64(id) * region
	}
	next, rnd := int64(0), uint64(id+1)*0x9e3779b97f4a7c15
	return func() int64 {
		off := base + next
		if w.random {
			rnd ^= rnd << 13
			rnd ^= rnd >> 7
			rnd ^= rnd << 17
			off = int64(rnd%uint64(region/stride)) * stride
		} else if next += stride; next == region {
			next = 0
		}
		return off
	}
}

// run keeps w.qd requests under way until stop, and returns how many were answered. id is the
// connection's number.
func (c *nbdConn) run(w workload, id int, stop *atomic.Bool) (done int64, err error) {
	if c.under == nil {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	next := w.offsets(c.size, id)
	var data []byte
	if w.write {
		data = pattern(w.bs)
	}
	offs := make([]int64, w.qd)
	issue := func(slot int) error {
		off := next()
		offs[slot] = off
		cmd := nbdwire.CmdRead
		if w.write {
			cmd = nbdwire.CmdWrite
		}
		c.out = appendRequest(c.out, cmd, uint64(slot), off, w.bs)
		if mark(data, off); w.bs > small && w.write {
			return c.sendLarge(data)
		}
		c.out = append(c.out, data...)
		return nil
	}
	for s := range w.qd {
		if err := issue(s); err != nil {
			return 0, err
		}
	}
	for left := w.qd; left > 0; {
		slot, err := c.reply(&w, offs)
		if err != nil {
			return done, err
		}
		done++
		if stop.Load() {
			left--
			continue
		}
		if err := issue(slot); err != nil {
			return done, err
		}
	}
	c.out = appendRequest(c.out, nbdwire.CmdDisc, 0, 0, 0)
	return done, c.flush()
}

func appendRequest(b []byte, cmd uint16, cookie uint64, off int64, n int) []byte {
	return (&nbdwire.Request{Cmd: cmd, Cookie: cookie, Off: uint64(off), Len: uint64(n)}).Append(b)
}

// reply receives replies until a request is answered in full, and returns its slot.
func (c *nbdConn) reply(w *workload, offs []int64) (int, error) {
	be := binary.BigEndian
	for {
		h, err := c.take(16)
		if err != nil {
			return 0, err
		}
		magic, mid, cookie := be.Uint32(h), be.Uint32(h[4:]), be.Uint64(h[8:])
		if cookie >= uint64(len(offs)) {
			return 0, fmt.Errorf("reply to an unknown request %#x", cookie)
		}
		slot := int(cookie)
		switch magic {
		case nbdwire.MagicSimple:
			if mid != 0 {
				return 0, fmt.Errorf("error %d at %d", mid, offs[slot])
			}
			if !w.write {
				err = c.data(w, offs[slot], w.bs)
			}
			return slot, err
		case nbdwire.MagicStructured:
			if err := c.chunk(w, uint16(mid)); err != nil {
				return 0, fmt.Errorf("read at %d: %w", offs[slot], err)
			}
			if mid>>16&1 != 0 {
				return slot, nil
			}
		default:
			return 0, fmt.Errorf("a reply begins with %#x", magic)
		}
	}
}

// chunk receives the rest of a chunk of that type.
func (c *nbdConn) chunk(w *workload, typ uint16) error {
	be := binary.BigEndian
	h, err := c.take(4)
	if err != nil {
		return err
	}
	n := int(be.Uint32(h))
	switch {
	case typ == nbdwire.ChunkOffsetData && n >= 8 && n-8 <= w.bs:
		if h, err = c.take(8); err != nil {
			return err
		}
		return c.data(w, int64(be.Uint64(h)), n-8)
	case typ == nbdwire.ChunkOffsetHole && w.verify:
		return errors.New("a hole where data are")
	case typ>>15 != 0:
		return fmt.Errorf("error chunk %#x", typ)
	case n > len(c.in):
		return fmt.Errorf("chunk of type %d with %d bytes", typ, n)
	}
	_, err = c.take(n)
	return err
}

// data receives n bytes of the export from off on.
func (c *nbdConn) data(w *workload, off int64, n int) error {
	take := c.take
	if n > small {
		take = c.takeLarge
	}
	b, err := take(n)
	if err != nil || !w.verify {
		return err
	}
	return marked(b, off)
}

// drive runs w against the server at path for secs and returns the requests a second.
func drive(path string, w workload, secs float64) (float64, error) {
	return driveBy(func() (*nbdConn, error) { return dialNBD(path) }, w, secs)
}

// driveBy is drive with connections that dial makes.
func driveBy(dial func() (*nbdConn, error), w workload, secs float64) (float64, error) {
	conns := make([]*nbdConn, w.conns)
	for i := range conns {
		c, err := dial()
		if err != nil {
			return 0, err
		}
		defer c.close()
		conns[i] = c
	}
	var stop atomic.Bool
	var total atomic.Int64
	errs := make([]error, w.conns)
	var wg sync.WaitGroup
	begin := time.Now()
	timer := time.AfterFunc(time.Duration(secs*1e9), func() { stop.Store(true) })
	defer timer.Stop()
	for i, c := range conns {
		wg.Go(func() {
			n, err := c.run(w, i, &stop)
			total.Add(n)
			errs[i] = err
		})
	}
	wg.Wait()
	return float64(total.Load()) / time.Since(begin).Seconds(), errors.Join(errs...)
}
