package nbd

import (
	"net"
	"runtime"
	"sync"
	"time"

	"qblockd/blockdev/tlscreds"
	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// reply is what a worker has to send: head, then data. What is in it is given back when sent.
type reply struct {
	head []byte // protocol bytes; holds its memory for reuse
	data []byte
	buf  *blk.Buffer // memory behind data
	next *reply      // sent right behind it
	cost int64       // of the job this is the last of; -1: not the last
	// fault is the error of the device that it tells, if any; of several replies the first has it.
	fault error
}

var replyPool = sync.Pool{New: func() any { return &reply{head: make([]byte, 0, 64)} }}

func newReply() *reply {
	p := replyPool.Get().(*reply)
	p.head, p.data, p.buf, p.next, p.cost, p.fault = p.head[:0], nil, nil, nil, -1, nil
	return p
}

// drop gives back what replies hold that are not to be sent.
func drop(p *reply) {
	for ; p != nil; p = p.next {
		blk.PutBuf(p.buf)
		p.buf, p.data = nil, nil
	}
}

// sender puts replies into a connection's socket: those that the reader has gathered, those of
// workers, and the ranges of files that mapped reads name. Whoever has something to send takes the
// lock if it is free; if not, workers leave their replies to who has it. It is held while the
// client does not take what is sent, hence never waited for with another lock held.
type sender struct {
	*conn

	// Replies that the reader has gathered, and not sent. The reader's goroutine alone uses them.
	batch    []byte
	batchBuf *blk.Buffer

	timer *time.Timer // looks after leases while nothing is sent

	mu sync.Mutex
	// why nothing can be sent any more
	failed error // +checklocks:mu
	// bytes put into the socket
	sent uint64 // +checklocks:mu
	// scratch of drainLocked
	vec   net.Buffers // +checklocks:mu
	taken []*reply    // +checklocks:mu
	// the transfer from a file under way
	sf     sendfile // +checklocks:mu
	leases leases   // +checklocks:mu

	// queueMu is a leaf.
	queueMu sync.Mutex
	// replies of workers
	queue []*reply // +checklocks:queueMu
}

// batchSize is how many bytes of replies the reader gathers at most.
const batchSize = 256 << 10

// start prepares for the transmission of c.
func (s *sender) start(c *conn) {
	s.conn = c
	s.batchBuf = blk.GetBuf(batchSize, 0)
	s.batch = s.batchBuf.B[:0]
	s.sf.init() // +checklocksignore: nobody else sends yet
	s.timer = panics.AfterFunc("the leases of an NBD connection", time.Hour, s.checkLeases)
	s.timer.Stop()
}

// end ends it when no request is left, and tells whether the peer has yet to take data of files.
func (s *sender) end() (linger bool) {
	s.timer.Stop()
	blk.PutBuf(s.batchBuf)
	s.batchBuf, s.batch = nil, nil
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = net.ErrClosed
	return s.releaseLocked() > 0
}

// reserve makes room for n bytes in the batch, n at most its size. An error of sending
// shows at the next flush.
func (s *sender) reserve(n int) {
	if len(s.batch)+n > cap(s.batch) {
		s.flush()
	}
}

// flush sends the batch.
func (s *sender) flush() error {
	if len(s.batch) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.unlock()
	return s.flushLocked()
}

// +checklocks:s.mu
func (s *sender) flushLocked() (err error) {
	if len(s.batch) > 0 {
		err = s.writeLocked(s.batch)
		s.batch = s.batch[:0]
	}
	return err
}

// +checklocks:s.mu
func (s *sender) reserveLocked(n int) {
	if len(s.batch)+n > cap(s.batch) {
		s.flushLocked()
	}
}

// put sends the reply of a worker, or leaves it to who is sending or is about to. Where others are
// under way, those that can go on now do so first, so that what they reply goes with it.
func (s *sender) put(p *reply) {
	small := len(p.data) < mapMin
	s.queueMu.Lock()
	first := len(s.queue) == 0
	s.queue = append(s.queue, p)
	s.queueMu.Unlock()
	if !first {
		return
	}
	if small && s.workers.several() {
		runtime.Gosched()
	}
	s.kick()
}

// writeLocked sends b. After an error nothing is sent any more and the connection is killed.
//
// +checklocks:s.mu
func (s *sender) writeLocked(b []byte) error {
	if s.failed != nil {
		return s.failed
	}
	n, err := s.nc.Write(b)
	s.sent += uint64(n)
	if err != nil {
		s.breakLocked(err)
	}
	return err
}

// breakLocked ends the connection because of a reply that cannot be sent in full.
//
// +checklocks:s.mu
func (s *sender) breakLocked(err error) {
	s.failed = err
	s.stop() // the reader may be waiting for requests of a client that will get no replies
}

// unlock gives mu back and sends what workers left for whoever held it.
//
// +checklocksrelease:s.mu
func (s *sender) unlock() {
	s.mu.Unlock()
	s.kick()
}

// kick sends the workers' replies, unless somebody is sending: that one will look again.
func (s *sender) kick() {
	for {
		s.queueMu.Lock()
		idle := len(s.queue) == 0
		s.queueMu.Unlock()
		if idle || !s.mu.TryLock() {
			return
		}
		s.drainLocked() // +checklocksforce: TryLock
		s.mu.Unlock()
	}
}

// drainLocked sends what is in the queue at this time with one system call if the client keeps up.
//
// +checklocks:s.mu
func (s *sender) drainLocked() {
	s.queueMu.Lock()
	s.taken, s.queue = s.queue, s.taken[:0]
	s.queueMu.Unlock()
	if len(s.taken) == 0 {
		return
	}
	vec := s.vec[:0]
	for _, p := range s.taken {
		for ; p != nil; p = p.next {
			if len(p.head) > 0 {
				vec = append(vec, p.head)
			}
			if len(p.data) > 0 {
				vec = append(vec, p.data)
			}
		}
	}
	if s.failed == nil {
		s.vec = vec // what consumes it needs a slice that lives in the heap
		n, err := tlscreds.WriteVec(s.nc, &s.vec)
		s.sent += uint64(n)
		if err != nil {
			s.breakLocked(err)
		}
	}
	clear(vec)
	s.vec = vec[:0]
	s.free(s.taken)
}

// free gives back what sent replies hold.
func (s *sender) free(ps []*reply) {
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
	s.workers.answered(count, bytes)
}
