package file

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// engineDepth is how many requests of one node an engine has in the kernel at once.
const engineDepth = 128

// ioOp is what a slot asks of the kernel.
type ioOp uint8

const (
	opRead ioOp = iota
	opWrite
	opSync
)

// slot is one request on its way. Its iov holds the buffers where the garbage collector
// sees them until the kernel has answered.
type slot struct {
	id    uint32
	op    ioOp
	fd    int
	off   int64
	flags uint32 // RWF_*
	n     int    // buffers in iov
	iov   [maxIov]unix.Iovec

	// out is set while the kernel has the slot: what tells the two sides' accesses apart.
	out  atomic.Bool
	res  int64 // bytes, or a negative errno
	done chan struct{}
}

// queue is a way to hand requests to the kernel and to hear of their end.
type queue interface {
	// push queues a slot; never more than engineDepth are between push and completion.
	// Calls of push exclude one another and submit's look at what was pushed.
	push(s *slot)
	// submit hands the oldest n queued slots over, or fewer, and tells how many. A slot that
	// the kernel refuses counts and is completed with its error. One call at a time.
	submit(n int, complete func(id uint32, res int64)) int
	// reap reports finished slots. One call at a time.
	reap(complete func(id uint32, res int64))
	// syncs tells whether opSync works.
	syncs() bool
	close()
}

// engine runs the requests of one node through a queue. Each caller waits for its own
// request, but parked, without a thread. Requests that arrive while one caller is busy
// submitting go out together with the next call.
//
//	free -> (fill, push) -> queued -> (submit) -> kernel -> (reap) -> done -> free
type engine struct {
	q     queue
	slots []*slot
	free  chan *slot
	batch int // most requests in one submit

	mu         sync.Mutex // guards push and the two fields below
	queued     int        // pushed, not yet submitted
	submitting bool       // a caller is in the submit loop

	wake     *os.File      // eventfd that the kernel writes to at each completion
	finished chan struct{} // closed when the reaping goroutine is gone
	complete func(id uint32, res int64)
}

// newEngine starts an engine. open gets the eventfd to signal completions with; batch 0
// means no limit but the depth.
func newEngine(batch int64, open func(efd int) (queue, error)) (*engine, error) {
	efd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	q, err := open(efd)
	if err != nil {
		_ = unix.Close(efd)
		return nil, err
	}
	e := &engine{
		q:        q,
		slots:    make([]*slot, engineDepth),
		free:     make(chan *slot, engineDepth),
		batch:    engineDepth,
		wake:     os.NewFile(uintptr(efd), "eventfd"),
		finished: make(chan struct{}),
	}
	if batch > 0 && batch < engineDepth {
		e.batch = int(batch)
	}
	e.complete = func(id uint32, res int64) {
		s := e.slots[id]
		if !s.out.CompareAndSwap(true, false) {
			panic("file: the kernel completed a request twice")
		}
		s.res = res
		s.done <- struct{}{}
	}
	for i := range e.slots {
		e.slots[i] = &slot{id: uint32(i), done: make(chan struct{}, 1)}
		e.free <- e.slots[i]
	}
	panics.Go("completions of files", e.run, nil)
	return e, nil
}

// run reaps completions until the engine is closed.
func (e *engine) run() {
	defer close(e.finished)
	defer panics.Fatal("completions of files") // the kernel has memory of ours
	var b [8]byte
	for {
		if _, err := e.wake.Read(b[:]); err != nil {
			return
		}
		e.q.reap(e.complete)
	}
}

// close ends the engine; no request is in it.
func (e *engine) close() {
	_ = e.wake.Close()
	<-e.finished
	e.q.close()
}

// do runs one request over the part of v from byte skip on and waits for its end, whatever
// becomes of r: the kernel has the buffers. Only for a free slot it waits no longer than
// r's root lasts. Returns the bytes moved.
func (e *engine) do(r *blk.Req, op ioOp, fd int, v blk.Vec, skip, off int64, flags uint32) (int64, error) {
	defer panics.Fatal("a request to the kernel") // which may have the buffers
	s, err := e.slot(r)
	if err != nil {
		return 0, err
	}
	s.op, s.fd, s.off, s.flags, s.n = op, fd, off, flags, fillIov(&s.iov, v, skip)

	s.out.Store(true)
	e.mu.Lock()
	e.q.push(s)
	e.queued++
	if !e.submitting {
		e.submitting = true
		for e.queued > 0 {
			n := min(e.queued, e.batch)
			e.mu.Unlock()
			n = e.q.submit(n, e.complete)
			if n == 0 {
				runtime.Gosched() // out of some resource: completions will free it
			}
			e.mu.Lock()
			e.queued -= n
		}
		e.submitting = false
	}
	e.mu.Unlock()

	<-s.done
	res := s.res
	clear(s.iov[:s.n])
	e.free <- s
	if res < 0 {
		return 0, unix.Errno(-res)
	}
	return res, nil
}

// slot takes a free slot.
func (e *engine) slot(r *blk.Req) (*slot, error) {
	select {
	case s := <-e.free:
		return s, nil
	default:
	}
	select {
	case s := <-e.free:
		return s, nil
	case <-r.Done():
		return nil, unix.ECANCELED
	}
}
