package nbd

import (
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// mapMin is the length from which reads are mapped, in bytes: below it a copy is cheaper
// than the additional system calls.
const mapMin = 64 << 10

var mappingPool = sync.Pool{New: func() any { return new(blk.Mapping) }}

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

// leases are a connection's, under the lock of its sender.
type leases struct {
	list  []lease       // oldest first
	wait  time.Duration // until they are looked at again
	armed bool          // sender.timer runs
}

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

// resident tells whether sending m will probably not wait for the disk: the first and the last page
// of each run are in memory, or the file system has no such thing as waiting. Reads that have to
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
	_, _, e := unix.Syscall6(unix.SYS_PREADV2,
		uintptr(fd), uintptr(unsafe.Pointer(&p.iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	return e != unix.EAGAIN
}

// mapRange maps q's range; false if that cannot be done in full, would wait, or gives so many
// pieces that copying is cheaper. So it is where the kernel reads from the disk each time: sendfile
// would do so piece by piece, and nothing else of the connection meanwhile.
func (s *session) mapRange(u *blk.Req, q *nbdwire.Request, m *blk.Mapping) bool {
	want, got := int64(q.Len), int64(0)
	for got < want {
		if s.dev.Map(u, int64(q.Off)+got, want-got, m) != nil {
			return false
		}
		n := m.N()
		if n <= got || int64(len(m.Ranges)) > 1+want/(mapMin/2) {
			return false
		}
		got = n
	}
	return got == want && !slices.ContainsFunc(m.Ranges, isDirect)
}

func isDirect(h blk.HostRange) bool { return h.Direct }

// sendMapped sends the reply to q from m, which becomes a lease. Errors of sending show at
// the next flush.
func (s *sender) sendMapped(q *nbdwire.Request, m *blk.Mapping) {
	whole := s.form == nbdwire.Simple || q.Flags&nbdwire.CmdFlagDF != 0
	s.mu.Lock()
	defer s.unlock()
	if whole {
		s.reserveLocked(nbdwire.MaxReplyHead)
		if s.form == nbdwire.Simple {
			s.batch = nbdwire.AppendSimple(s.batch, q.Cookie, 0)
		} else {
			s.batch = s.form.AppendDataHead(s.batch, 0, q, q.Off, int(q.Len))
		}
	}
	off := int64(q.Off)
	var err error
	live := false
	for _, h := range m.Ranges {
		live = live || h.FD >= 0
		bad, e := s.sendRangeLocked(q, h, off, whole)
		if e != nil && err == nil {
			err = e
			s.srv.log.Warn("NBD read failed after its reply had begun", "offset", bad, "err", e)
			if s.form == nbdwire.Simple {
				s.breakLocked(e)
				break
			}
			if rest := int64(q.Off) + int64(q.Len) - off - h.N; whole {
				s.zeroesLocked(rest)
			}
			s.reserveLocked(nbdwire.MaxReplyHead + len(msgRead))
			s.batch = s.form.AppendErrorOffset(s.batch, q, nbdwire.Errno(e), uint64(bad), msgRead)
			break
		}
		off += h.N
	}
	if err == nil && s.form != nbdwire.Simple {
		s.reserveLocked(nbdwire.MaxReplyHead)
		s.batch = s.form.AppendChunk(s.batch, nbdwire.ChunkDone, nbdwire.ChunkNone, q, 0)
	}
	if !live {
		m.Release()
		mappingPool.Put(m)
		return
	}
	s.leases.list = append(s.leases.list, lease{m, s.sent})
	s.releaseLocked()
}

// sendRangeLocked sends one run of a mapped read, which is off in the export. On a
// failure it fills the run up with zeroes and returns where it failed.
//
// +checklocks:s.mu
func (s *sender) sendRangeLocked(q *nbdwire.Request, h blk.HostRange, off int64, whole bool) (bad int64, err error) {
	if h.FD < 0 {
		if whole {
			s.zeroesLocked(h.N)
		} else {
			s.reserveLocked(nbdwire.MaxReplyHead)
			s.batch = s.form.AppendHole(s.batch, 0, q, uint64(off), uint32(h.N))
		}
		return 0, nil
	}
	if !whole {
		s.reserveLocked(nbdwire.MaxReplyHead)
		s.batch = s.form.AppendDataHead(s.batch, 0, q, uint64(off), int(h.N))
	}
	s.flushLocked()
	if s.failed != nil {
		return 0, nil
	}
	f := &s.sf
	f.file, f.off, f.left, f.err = h.FD, h.Off, h.N, nil
	werr := s.raw.Write(f.run)
	s.sent += uint64(h.N - f.left)
	if werr == nil && f.err == nil {
		return 0, nil
	}
	if werr != nil || isPeerError(f.err) {
		if werr == nil {
			werr = f.err
		}
		s.breakLocked(werr)
		return 0, nil
	}
	bad = off + h.N - f.left
	if s.form != nbdwire.Simple {
		s.zeroesLocked(f.left)
	}
	return bad, f.err
}

// isPeerError tells errors of the socket from errors of the file.
func isPeerError(err error) bool {
	switch err {
	case syscall.EPIPE, syscall.ECONNRESET, syscall.ENOTCONN, syscall.ETIMEDOUT:
		return true
	}
	return false
}

// zeroesLocked sends n zero bytes.
//
// +checklocks:s.mu
func (s *sender) zeroesLocked(n int64) {
	s.flushLocked()
	for n > 0 && s.failed == nil {
		k := min(n, 64<<10)
		s.writeLocked(blk.Zeroes(int(k)))
		n -= k
	}
}

// releaseLocked ends the leases whose bytes the peer has taken and returns how many are left. A
// unix socket's queue counts at least the bytes that were not taken, in order, so
// whatever lies further back than that has been. The timer looks again.
//
// +checklocks:s.mu
func (s *sender) releaseLocked() int {
	l := &s.leases
	if len(l.list) == 0 {
		return 0
	}
	s.sf.queued = 0
	if s.raw.Control(s.sf.count) != nil {
		s.sf.queued = 0
	}
	taken := s.sent - min(s.sent, uint64(s.sf.queued))
	k := 0
	for k < len(l.list) && l.list[k].end <= taken {
		l.list[k].m.Release()
		mappingPool.Put(l.list[k].m)
		k++
	}
	l.list = slices.Delete(l.list, 0, k)
	if k > 0 || l.wait == 0 {
		l.wait = leasePoll
	}
	if len(l.list) > 0 && s.failed == nil && !l.armed {
		l.armed = true
		s.timer.Reset(l.wait)
	}
	return len(l.list)
}

// checkLeases runs when leases have been waiting for a while.
func (s *sender) checkLeases() {
	if !s.mu.TryLock() {
		s.timer.Reset(leasePoll) // who sends does not always look
		return
	}
	s.leases.armed = false // +checklocksforce: TryLock
	defer s.unlock()
	if s.failed != nil {
		return
	}
	s.leases.wait = min(2*s.leases.wait, 100*time.Millisecond)
	s.releaseLocked()
}

// linger keeps the ended connection's socket until the peer has taken what refers to
// pages of files, at most lingerMax.
func (s *sender) linger() {
	defer s.nc.Close()
	for end := time.Now().Add(lingerMax); time.Now().Before(end); time.Sleep(leasePoll) {
		s.mu.Lock()
		left := s.releaseLocked()
		s.unlock()
		if left == 0 {
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.leases.list {
		l.m.Release()
	}
	s.leases.list = nil
}
