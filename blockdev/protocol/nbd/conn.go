package nbd

import (
	"bufio"
	"context"
	"errors"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/clock"
	"qblockd/graph/blk"
)

const (
	// maxInFlight is how many requests are under way on a connection.
	maxInFlight = 64
	// readBuffer holds replies that have come with one system call, in bytes.
	readBuffer = 64 << 10
	// sendPiece is how much is given to the kernel at once, so that it shows when a server takes
	// it.
	sendPiece = 256 << 10
	// silence is how long a server may answer nothing and move less than progress while somebody
	// wants to be rid of its requests. That is looked at each lookTime.
	silence, lookTime = 5 * time.Second, time.Second
	// progress, in bytes, is more than what a server gives away that answers byte by byte.
	progress = 64 << 10
)

var (
	errSilent = errors.New("the server does not answer")
	errClosed = errors.New("the node is closed")

	errInternal = errors.New("internal error")
)

// conn is a connection in transmission.
//
// A request takes a slot, is queued, sent by whoever is sending, answered by the reader and done
// when it is both sent and answered: until then its buffers are in use.
type conn struct {
	nc    net.Conn
	e     *export
	clock clock.Clock
	born  time.Time
	free  chan *slot
	gone  chan struct{} // closed when the connection has ended and all its requests are done
	slots [maxInFlight]slot
	moved atomic.Int64 // bytes that came or went, and progress for each answer
	load  atomic.Int32 // requests that have it, for who chooses between connections

	// Whose turn it is to read.
	in       *bufio.Reader
	parts    [][]byte
	answered atomic.Bool // something was
	asked    bool        // something was, and got no answer
	alone    int         // how many answers in a row left nothing under way

	// The sender's.
	batch []*slot
	bufs  [][]byte
	out   net.Buffers
	files fileSender

	mu    sync.Mutex
	idle  sync.Cond
	queue []*slot // +checklocks:mu
	// somebody sends, or was asked to
	sending bool // +checklocks:mu
	// of who sends
	sender context.Context // +checklocks:mu
	// of the request that reads
	leader context.Context // +checklocks:mu
	told   sync.Cond       // run is to look at turn, with mu
	// whose turn it is to read replies
	turn turn // +checklocks:mu
	// slots that are busy
	busy int // +checklocks:mu
	// those of them that have no answer yet
	open int // +checklocks:mu
	// why the connection has ended
	dead error // +checklocks:mu
	// those who want to be rid of the requests under way
	hurries int // +checklocks:mu
	// moved, and the time, when the server has moved enough or nobody was in a hurry
	seen  int64     // +checklocks:mu
	since time.Time // +checklocks:mu
	// calls look, if watched
	watch   clock.Timer // +checklocks:mu
	watched bool        // +checklocks:mu
}

// slot is a request under way.
type slot struct {
	cookie uint64 // of the request that has the slot
	req    nbdwire.Request
	head   []byte // as it is sent
	body
	done chan signal

	// Guarded by conn.mu.
	busy, sent, answered bool
	lost                 bool // the connection ended first

	// The sender's, then that of who waits: zeroes stand for something that the file does not have.
	short bool

	// The reader's, then those of who waits.
	err     error
	errs    int    // chunks that told of one
	filled  []span // what of in is there, in order and with gaps between
	extents int
	extent  nbdwire.Extent // the first
}

// body is what a request moves besides its head.
type body struct {
	out  blk.Vec       // what a write sends, or
	file blk.HostRange // what it sends of a file
	in   blk.Vec       // what a read fills
}

// span is [from, to), in bytes.
type span struct{ from, to int64 }

// signal is what who waits for a slot is told.
type signal bool

const (
	finished signal = false
	yourTurn signal = true // to send what is queued
)

func newConn(nc net.Conn, e *export, clk clock.Clock) *conn {
	c := &conn{
		nc: nc, e: e, clock: clk, born: clk.Now(), free: make(chan *slot, maxInFlight), gone: make(chan struct{}),
	}
	c.in = bufio.NewReaderSize(meter{c}, readBuffer)
	c.files.init(nc, &c.moved)
	c.idle.L, c.told.L = &c.mu, &c.mu
	for i := range c.slots {
		s := &c.slots[i]
		s.cookie, s.done = uint64(i), make(chan signal, 2)
		s.head = make([]byte, 0, nbdwire.ExtRequestSize)
		c.free <- s
	}
	return c
}

// meter reads from the connection and notes that something has come.
type meter struct{ c *conn }

func (m meter) Read(b []byte) (int, error) {
	n, err := m.c.nc.Read(b)
	m.c.moved.Add(int64(n))
	return n, err
}

// do has a request executed. lost: the connection ended before the answer, so the request may have
// been executed or not. blk.ErrNotSupported: the file that b names could not be sent, or not all of
// it, and something may have been written instead.
func (c *conn) do(r *blk.Req, q nbdwire.Request, b body) (x nbdwire.Extent, lost bool, err error) {
	if b.file.N > 0 && c.files.raw == nil {
		return x, false, blk.ErrNotSupported
	}
	s, err := c.take(r)
	if s == nil {
		return x, err == nil, err
	}
	s.cookie += maxInFlight // so that none is used twice
	q.Cookie = s.cookie
	s.req, s.body = q, b
	s.head = c.header(s.head[:0], q)
	s.sent, s.answered, s.lost, s.short, s.err = false, false, false, false, nil
	s.errs, s.filled, s.extents = 0, s.filled[:0], 0
	if c.send(r, s) {
		c.wait(r, s)
	} else {
		<-c.gone // who is told of it must not come back to this connection
		s.lost = true
	}
	x, lost, err = s.extent, s.lost, s.err
	if s.short && err == nil {
		err = blk.ErrNotSupported
	}
	s.body = body{}
	c.free <- s
	return x, lost, err
}

// header is a request as the server takes it.
func (c *conn) header(b []byte, q nbdwire.Request) []byte {
	if !c.e.extended {
		return q.Append(b)
	}
	if q.Cmd == nbdwire.CmdWrite {
		q.Flags |= nbdwire.CmdFlagPayload
	}
	return q.AppendExt(b)
}

// take waits for a free slot; it is nil with an error, or without if the connection has ended.
func (c *conn) take(r *blk.Req) (*slot, error) {
	select {
	case s := <-c.free:
		return s, nil
	default:
	}
	select {
	case s := <-c.free:
		return s, nil
	case <-c.gone:
		return nil, nil
	case <-r.Done():
		return nil, syscall.ECANCELED
	}
}

// send queues a request, and sends what is queued unless somebody else does. It is false if the
// connection has ended.
func (c *conn) send(r *blk.Req, s *slot) bool {
	c.mu.Lock()
	if c.dead != nil {
		c.mu.Unlock()
		return false
	}
	s.busy = true
	c.busy++
	c.open++
	c.queue = append(c.queue, s)
	mine := !c.sending
	c.sending = true
	several := c.open > 1
	if several && c.turn == nobodys {
		c.turnLocked(runs)
	}
	c.watchLocked()
	c.mu.Unlock()
	if mine {
		if several {
			runtime.Gosched() // others that are about to send do so with this one
		}
		c.sendQueued(r, s)
	}
	return true
}

// sendQueued sends until nothing is queued, or until own, the slot of r, is done: then it is
// another's turn.
func (c *conn) sendQueued(r *blk.Req, own *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sender = r.Ctx
	defer func() { c.sender = nil }()
	for c.dead == nil && len(c.queue) > 0 {
		if !own.busy {
			c.queue[0].done <- yourTurn
			return
		}
		c.batch, c.queue = c.queue, c.batch[:0]
		c.mu.Unlock()
		err := c.write()
		c.mu.Lock()
		if err != nil {
			c.killLocked(err)
			break
		}
		for i, s := range c.batch {
			if s.sent = true; s.answered {
				c.finishLocked(s)
			}
			c.batch[i] = nil
		}
	}
	c.sending = false
	c.idle.Signal()
}

// write sends the batch.
func (c *conn) write() error {
	for _, s := range c.batch {
		head := len(c.bufs)
		c.bufs = s.out.AppendTo(append(c.bufs, s.head))
		for i := head + 1; i < len(c.bufs); i++ {
			if b := c.bufs[i]; len(b) > sendPiece {
				c.bufs = slices.Insert(c.bufs, i+1, b[sendPiece:])
				c.bufs[i] = b[:sendPiece]
			}
		}
		if s.file.N == 0 {
			continue
		}
		err := c.writeBufs()
		if err == nil {
			s.short, err = c.files.send(c.nc, s.file)
		}
		if err != nil {
			return err
		}
	}
	return c.writeBufs()
}

// writeBufs sends what is gathered.
func (c *conn) writeBufs() error {
	defer func() {
		clear(c.bufs)
		c.bufs = c.bufs[:0]
	}()
	for i := 0; i < len(c.bufs); {
		first := i
		for n := 0; i < len(c.bufs) && n < sendPiece; i++ {
			n += len(c.bufs[i])
		}
		c.out = c.bufs[first:i]
		n, err := tlscreds.WriteVec(c.nc, &c.out)
		if c.moved.Add(n); err != nil {
			return err
		}
	}
	return nil
}

// wait waits until a request is done.
func (c *conn) wait(r *blk.Req, s *slot) {
	c.lead(r, s)
	stop := r.Done()
	for {
		select {
		case what := <-s.done:
			if what == finished {
				return
			}
			c.sendQueued(r, s)
		case <-stop:
			stop = nil
			c.hurry()
			defer c.relax()
		}
	}
}

// finishLocked tells who waits for a request that it is done.
// +checklocks:c.mu
func (c *conn) finishLocked(s *slot) {
	s.busy = false
	c.busy--
	s.done <- finished
}

// kill ends the connection.
func (c *conn) kill(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.killLocked(err)
}

// +checklocks:c.mu
func (c *conn) killLocked(err error) {
	if c.dead == nil {
		c.dead = err
		if err != errClosed {
			c.forget()
		}
		_ = c.nc.Close() // wakes who reads and who sends
		c.told.Signal()
		if c.watched {
			c.watch.Stop()
			c.watched = false
		}
	}
}

// forget makes the end of the connection drop what the kernel has not sent yet. That would come to
// the server at any time later, and there could be newer writes by then: what was lost with the
// connection is sent again by the next one.
func (c *conn) forget() {
	nc := c.nc
	if t, ok := nc.(*tlscreds.Conn); ok {
		nc = t.Below()
	}
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // fails where it has ended already
	}
}

// run reads replies until the connection ends, and tells ended why before the requests that are
// left are done.
func (c *conn) run(ended func(error)) {
	defer func() {
		c.kill(errInternal) // in a panic; else the error is known
		c.mu.Lock()
		for c.sending {
			c.idle.Wait()
		}
		err := c.dead
		c.asked = c.busy > 0
		c.mu.Unlock()
		ended(err)
		c.mu.Lock()
		for i := range c.slots {
			if s := &c.slots[i]; s.busy {
				s.lost = true
				c.finishLocked(s)
			}
		}
		c.mu.Unlock()
		close(c.gone)
	}()
	for c.mayRead() {
		if err := c.readReply(); err != nil {
			c.kill(err)
			return
		}
	}
}

// bye tells the server that nothing more will come, if that can be told at once.
func (c *conn) bye() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sending || c.dead != nil {
		return
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdDisc}
	_ = c.nc.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
	_, _ = c.nc.Write(c.header(nil, q)) // it would see the end in any case
}

// hurry says that somebody wants to be rid of the requests under way: a server that moves nothing
// meanwhile is given up. relax takes that back.
func (c *conn) hurry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hurries++; c.hurries == 1 {
		c.seen, c.since = c.moved.Load(), c.clock.Now()
	}
}

func (c *conn) relax() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hurries--
}

// watchLocked has look called for as long as requests are under way.
// +checklocks:c.mu
func (c *conn) watchLocked() {
	switch {
	case c.watched:
		return
	case c.watch == nil:
		c.watch = c.clock.AfterFunc("the watch over an NBD server", lookTime, c.look)
	default:
		c.watch.Reset(lookTime)
	}
	c.watched = true
}

func (c *conn) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watched = false
	if c.open == 0 && c.turn == nobodys {
		c.turnLocked(runs) // the end of the connection is to be noticed
	}
	if c.dead != nil || c.busy == 0 {
		return
	}
	// Who sends or reads cannot look at its own context meanwhile.
	hurry := c.hurries > 0 || c.sender != nil && c.sender.Err() != nil || c.leader != nil && c.leader.Err() != nil
	moved, now := c.moved.Load(), c.clock.Now()
	if !hurry || moved-c.seen >= progress {
		c.seen, c.since = moved, now
	} else if now.Sub(c.since) >= silence {
		c.killLocked(errSilent)
		return
	}
	c.watchLocked()
}
