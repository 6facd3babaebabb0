package nbd

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// send writes b during the handshake.
func (c *conn) send(b []byte) error {
	_, err := c.nc.Write(b)
	return err
}

// writeLocked sends b. After an error nothing is sent any more and the connection is killed.
//
// +checklocks:c.sendMu
func (c *conn) writeLocked(b []byte) error {
	if c.failed != nil {
		return c.failed
	}
	n, err := c.nc.Write(b)
	c.sent += uint64(n)
	if err != nil {
		c.breakLocked(err)
	}
	return err
}

// breakLocked ends the connection because of a reply that cannot be sent in full.
//
// +checklocks:c.sendMu
func (c *conn) breakLocked(err error) {
	c.failed = err
	c.dead.Store(true)
	// The reader may be waiting for requests of a client that will get no replies.
	c.raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	c.cancel()
}

// unlockSend gives sendMu back and sends what workers left for whoever held it.
//
// +checklocksrelease:c.sendMu
func (c *conn) unlockSend() {
	c.sendMu.Unlock()
	c.kick()
}

// kick sends the workers' replies, unless somebody is sending: that one will look again.
func (c *conn) kick() {
	for {
		c.mu.Lock()
		idle := len(c.out) == 0
		c.mu.Unlock()
		if idle || !c.sendMu.TryLock() {
			return
		}
		c.drainLocked() // +checklocksforce: TryLock
		c.sendMu.Unlock()
	}
}

// drainLocked sends what is in c.out at this time with one system call if the client keeps up.
//
// +checklocks:c.sendMu
func (c *conn) drainLocked() {
	c.mu.Lock()
	c.taken, c.out = c.out, c.taken[:0]
	c.mu.Unlock()
	if len(c.taken) == 0 {
		return
	}
	vec := c.vec[:0]
	for _, p := range c.taken {
		for ; p != nil; p = p.next {
			if len(p.head) > 0 {
				vec = append(vec, p.head)
			}
			if len(p.data) > 0 {
				vec = append(vec, p.data)
			}
		}
	}
	if c.failed == nil {
		c.vec = vec // WriteTo consumes a slice that must live in the heap
		n, err := c.vec.WriteTo(c.nc)
		c.sent += uint64(n)
		if err != nil {
			c.breakLocked(err)
		}
	}
	clear(vec)
	c.vec = vec[:0]
	c.free(c.taken)
}

// free gives back what sent replies hold.
func (c *conn) free(ps []*reply) {
	count, bytes := 0, int64(0)
	for i, p := range ps {
		for p != nil {
			if p.cost >= 0 {
				count++
				bytes += p.cost
			}
			blk.PutBuf(p.buf)
			next := p.next
			p.buf, p.data, p.next = nil, nil, nil
			if cap(p.head) <= 4096 {
				replyPool.Put(p)
			}
			p = next
		}
		ps[i] = nil
	}
	c.mu.Lock()
	c.inflight -= count
	c.bytes -= bytes
	c.room.Broadcast()
	c.mu.Unlock()
}

// mapMin is the length from which reads are mapped, in bytes: below it a copy is cheaper
// than the additional system calls.
const mapMin = 64 << 10

// lease is a mapping whose pages are in the socket's queue up to the byte end of what was sent.
type lease struct {
	m   *blk.Mapping
	end uint64
}

// How often leases are looked at while the connection is idle, and how long a connection
// that ends is kept for them.
const (
	leasePoll = 2 * time.Millisecond
	lingerMax = 10 * time.Second
)

// sendfile is the state of one transfer from a file to the socket. The functions are made
// once: a closure per call would be an allocation per call.
type sendfile struct {
	file int   // descriptor
	off  int64 // in it
	left int64
	err  error // why it stopped short
	run  func(fd uintptr) bool

	queued int // bytes in the socket's send queue
	count  func(fd uintptr)
}

func (s *sendfile) init() {
	s.run = func(fd uintptr) bool {
		for s.left > 0 {
			n, err := unix.Sendfile(int(fd), s.file, &s.off, int(min(s.left, 1<<30)))
			switch {
			case n > 0:
				s.left -= int64(n)
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				return false
			case err != nil:
				s.err = err
				return true
			default:
				s.err = unix.EIO // the file ends here
				return true
			}
		}
		return true
	}
	s.count = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), unix.TIOCOUTQ)
		if err != nil {
			n = 0 // the socket is gone and its queue with it
		}
		s.queued = n
	}
}

// probe is what resident reads into.
type probe struct {
	to  [1]byte
	iov unix.Iovec
}

// streamMin is the length from which reads are sent by sendfile even if that waits for the
// disk, in bytes: the kernel reads ahead within one, and a copy would cost more than it gains.
const streamMin = 512 << 10

// resident tells whether sending m will probably not wait for the disk: the first and the last
// page of each run are in memory, or the file system has no such thing as waiting. Reads that have to
// wait are better off with workers, which wait for several at a time.
func (p *probe) resident(m *blk.Mapping) bool {
	for i := range m.Ranges {
		h := &m.Ranges[i]
		if h.FD >= 0 && (!p.inMemory(h.FD, h.Off) || !p.inMemory(h.FD, h.Off+h.N-1)) {
			return false
		}
	}
	return true
}

// inMemory reads one byte if that takes no waiting.
func (p *probe) inMemory(fd int, off int64) bool {
	p.iov.Base = &p.to[0]
	p.iov.SetLen(1)
	_, _, e := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&p.iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	return e != unix.EAGAIN
}

// readMapped answers q by sendfile if the device maps the whole range without waiting.
func (c *conn) readMapped(q *nbdwire.Request) bool {
	start := time.Now()
	r := c.enter()
	if r == nil {
		return false
	}
	m := c.mapping()
	r.NoWait = true
	ok := c.mapRange(r, q, m)
	r.NoWait = false
	c.leave()
	ok = ok && (q.Len >= streamMin || c.probe.resident(m))
	if !ok {
		m.Release()
		c.maps = append(c.maps, m)
		return false
	}
	c.sendMapped(q, m)
	c.dev.Mapped(int64(q.Len), time.Since(start))
	return true
}

// mapping returns an empty mapping.
func (c *conn) mapping() *blk.Mapping {
	if len(c.maps) == 0 {
		c.sendMu.Lock()
		c.maps, c.spare = c.spare, c.maps
		c.unlockSend()
	}
	if n := len(c.maps); n > 0 {
		m := c.maps[n-1]
		c.maps = c.maps[:n-1]
		return m
	}
	return new(blk.Mapping)
}

// mapRange maps q's range; false if that cannot be done in full, would wait, or gives so many
// pieces that copying is cheaper.
func (c *conn) mapRange(r *blk.Req, q *nbdwire.Request, m *blk.Mapping) bool {
	want, got := int64(q.Len), int64(0)
	for got < want {
		if c.dev.Map(r, int64(q.Off)+got, want-got, m) != nil {
			return false
		}
		n := m.N()
		if n <= got || int64(len(m.Ranges)) > 1+want/(mapMin/2) {
			return false
		}
		got = n
	}
	return got == want
}

// sendMapped sends the reply to q from m, which becomes a lease. Errors of sending show at
// the next flush.
func (c *conn) sendMapped(q *nbdwire.Request, m *blk.Mapping) {
	whole := !c.structured || q.Flags&nbdwire.CmdFlagDF != 0
	c.sendMu.Lock()
	defer c.unlockSend()
	if whole {
		c.reserveLocked(nbdwire.DataHeadSize)
		if c.structured {
			c.batch = nbdwire.AppendDataHead(c.batch, 0, q.Cookie, q.Off, int(q.Len))
		} else {
			c.batch = nbdwire.AppendSimple(c.batch, q.Cookie, 0)
		}
	}
	off := int64(q.Off)
	var err error
	live := false
	for _, h := range m.Ranges {
		live = live || h.FD >= 0
		bad, e := c.sendRangeLocked(q, h, off, whole)
		if e != nil && err == nil {
			err = e
			c.srv.log.Warn("NBD read failed after its reply had begun", "offset", bad, "err", e)
			if !c.structured {
				c.breakLocked(e)
				break
			}
			c.finishLocked(q, off+h.N, int64(q.Off)+int64(q.Len), whole)
			c.batch = nbdwire.AppendErrorOffset(c.batch, q.Cookie, nbdwire.Errno(e), uint64(bad), msgRead)
			break
		}
		off += h.N
	}
	if err == nil && c.structured {
		c.reserveLocked(nbdwire.ChunkSize)
		c.batch = nbdwire.AppendChunk(c.batch, nbdwire.ChunkDone, nbdwire.ChunkNone, q.Cookie, 0)
	}
	if !live {
		m.Release()
		c.maps = append(c.maps, m)
		return
	}
	c.leases = append(c.leases, lease{m, c.sent})
	c.releaseLocked()
}

// sendRangeLocked sends one run of a mapped read, which is off in the export. On a
// failure it fills the run up with zeroes and returns where it failed.
//
// +checklocks:c.sendMu
func (c *conn) sendRangeLocked(q *nbdwire.Request, h blk.HostRange, off int64, whole bool) (bad int64, err error) {
	if h.FD < 0 {
		if whole {
			c.zeroesLocked(h.N)
		} else {
			c.reserveLocked(nbdwire.HoleSize)
			c.batch = nbdwire.AppendHole(c.batch, 0, q.Cookie, uint64(off), uint32(h.N))
		}
		return 0, nil
	}
	if !whole {
		c.reserveLocked(nbdwire.DataHeadSize)
		c.batch = nbdwire.AppendDataHead(c.batch, 0, q.Cookie, uint64(off), int(h.N))
	}
	c.writeBatchLocked()
	if c.failed != nil {
		return 0, nil
	}
	s := &c.sf
	s.file, s.off, s.left, s.err = h.FD, h.Off, h.N, nil
	werr := c.raw.Write(s.run)
	c.sent += uint64(h.N - s.left)
	if werr == nil && s.err == nil {
		return 0, nil
	}
	if werr != nil || isPeerError(s.err) {
		if werr == nil {
			werr = s.err
		}
		c.breakLocked(werr)
		return 0, nil
	}
	bad = off + h.N - s.left
	if c.structured {
		c.zeroesLocked(s.left)
	}
	return bad, s.err
}

// isPeerError tells errors of the socket from errors of the file.
func isPeerError(err error) bool {
	switch err {
	case syscall.EPIPE, syscall.ECONNRESET, syscall.ENOTCONN, syscall.ETIMEDOUT:
		return true
	}
	return false
}

// finishLocked completes a data chunk of the whole range that goes on from off to end.
//
// +checklocks:c.sendMu
func (c *conn) finishLocked(q *nbdwire.Request, off, end int64, whole bool) {
	if whole && off < end {
		c.zeroesLocked(end - off)
	}
	c.reserveLocked(nbdwire.ChunkSize + 14 + len(msgRead))
}

// zeroesLocked sends n zero bytes.
//
// +checklocks:c.sendMu
func (c *conn) zeroesLocked(n int64) {
	c.writeBatchLocked()
	for n > 0 && c.failed == nil {
		k := min(n, 64<<10)
		c.writeLocked(blk.Zeroes(int(k)))
		n -= k
	}
}

// +checklocks:c.sendMu
func (c *conn) writeBatchLocked() {
	if len(c.batch) > 0 {
		c.writeLocked(c.batch)
		c.batch = c.batch[:0]
	}
}

// +checklocks:c.sendMu
func (c *conn) reserveLocked(n int) {
	if len(c.batch)+n > cap(c.batch) {
		c.writeBatchLocked()
	}
}

// releaseLocked ends the leases whose bytes the peer has taken and returns how many are left. A
// unix socket's queue counts at least the bytes that were not taken, in order, so
// whatever lies further back than that has been. The timer looks again.
//
// +checklocks:c.sendMu
func (c *conn) releaseLocked() int {
	if len(c.leases) == 0 {
		return 0
	}
	c.sf.queued = 0
	if c.raw.Control(c.sf.count) != nil {
		c.sf.queued = 0
	}
	taken := c.sent - min(c.sent, uint64(c.sf.queued))
	k := 0
	for k < len(c.leases) && c.leases[k].end <= taken {
		m := c.leases[k].m
		m.Release()
		c.spare = append(c.spare, m)
		k++
	}
	if k > 0 {
		n := copy(c.leases, c.leases[k:])
		clear(c.leases[n:])
		c.leases = c.leases[:n]
	}
	if k > 0 || c.leaseWait == 0 {
		c.leaseWait = leasePoll
	}
	if len(c.leases) > 0 && c.failed == nil && !c.leaseArmed {
		c.leaseArmed = true
		c.leaseTimer.Reset(c.leaseWait)
	}
	return len(c.leases)
}

// checkLeases runs when leases have been waiting for a while.
func (c *conn) checkLeases() {
	if !c.sendMu.TryLock() {
		c.leaseTimer.Reset(leasePoll) // who sends does not always look
		return
	}
	c.leaseArmed = false // +checklocksforce: TryLock
	defer c.unlockSend()
	if c.failed != nil {
		return
	}
	c.leaseWait = min(2*c.leaseWait, 100*time.Millisecond)
	c.releaseLocked()
}

// linger keeps the ended connection's socket until the peer has taken what refers to
// pages of files, at most lingerMax.
func (c *conn) linger() {
	defer c.nc.Close()
	for end := time.Now().Add(lingerMax); time.Now().Before(end); time.Sleep(leasePoll) {
		c.sendMu.Lock()
		left := c.releaseLocked()
		c.unlockSend()
		if left == 0 {
			return
		}
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	for _, l := range c.leases {
		l.m.Release()
	}
	c.leases = nil
}
