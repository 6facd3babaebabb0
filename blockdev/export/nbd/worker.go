package nbd

import (
	"math"
	"sync"

	"qblockd/blockdev/export"
	"qblockd/blockdev/nbdwire"
	"qblockd/events/panics"
	"qblockd/graph/blk"
)

// job is a request on its way through a worker.
type job struct {
	q    nbdwire.Request
	buf  *blk.Buffer // payload of a write
	cost int64       // what it counts against Options.InflightBytes
}

var jobPool = sync.Pool{New: func() any { return new(job) }}

// reply is what a worker has to send: head, then data. What is in it is given back when sent.
type reply struct {
	head []byte // protocol bytes; holds its memory for reuse
	data []byte
	buf  *blk.Buffer // memory behind data
	next *reply      // sent right behind it
	cost int64       // of the job this is the last of; -1: not the last
}

var replyPool = sync.Pool{New: func() any { return &reply{head: make([]byte, 0, 64)} }}

func newReply() *reply {
	p := replyPool.Get().(*reply)
	p.head, p.data, p.buf, p.next, p.cost = p.head[:0], nil, nil, nil, -1
	return p
}

// cost is what q's data take while it is under way.
func (c *conn) cost(q *nbdwire.Request) int64 {
	switch q.Cmd {
	case nbdwire.CmdRead, nbdwire.CmdWrite:
		return int64(q.Len)
	case nbdwire.CmdBlockStatus:
		return int64(c.ctxs.count()) * maxExtents * nbdwire.ExtentSize
	}
	return 0
}

// dispatch hands q to a worker, waiting while too much is under way. buf becomes the worker's.
func (c *conn) dispatch(q *nbdwire.Request, buf *blk.Buffer) error {
	j := jobPool.Get().(*job)
	j.q, j.buf, j.cost = *q, buf, c.cost(q)
	if err := c.waitRoom(j.cost); err != nil {
		blk.PutBuf(buf)
		return err
	}
	c.mu.Lock()
	c.inflight++
	c.bytes += j.cost
	c.queue = append(c.queue, j)
	start := c.workers < maxWorkers
	if start {
		c.workers++
	}
	c.mu.Unlock()
	if start {
		go c.worker() // a go statement with arguments would allocate
	}
	return nil
}

// waitRoom waits until n more bytes may be under way; what is gathered is sent before that.
func (c *conn) waitRoom(n int64) error {
	c.mu.Lock()
	fits := c.fitsLocked(n)
	c.mu.Unlock()
	if fits {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.fitsLocked(n) {
		c.room.Wait()
	}
	return nil
}

// +checklocks:c.mu
func (c *conn) fitsLocked(n int64) bool {
	return c.inflight == 0 || c.inflight < c.srv.opts.Inflight && c.bytes+n <= c.srv.opts.InflightBytes
}

// work serves what is queued.
func (c *conn) work() {
	defer panics.Catch("an NBD worker", func(error) { c.kill() })
	for {
		c.mu.Lock()
		if len(c.queue) == 0 {
			c.workers--
			c.mu.Unlock()
			return
		}
		j := c.queue[0]
		copy(c.queue, c.queue[1:])
		c.queue[len(c.queue)-1] = nil
		c.queue = c.queue[:len(c.queue)-1]
		c.mu.Unlock()
		p := c.serveSafely(j)
		// The last reply carries the cost, so that memory counts until it is sent.
		last := p
		for last.next != nil {
			last = last.next
		}
		last.cost = j.cost
		j.buf = nil
		jobPool.Put(j)
		c.mu.Lock()
		c.out = append(c.out, p)
		c.mu.Unlock()
		c.kick()
	}
}

// serveSafely is serve; after a panic the request fails, and the connection is dropped.
func (c *conn) serveSafely(j *job) (p *reply) {
	defer panics.Catch("an NBD request", func(err error) {
		c.kill()
		p = c.failure(&j.q, nbdwire.Errno(err), msgInternal)
	})
	return c.serve(j)
}

// serve performs j in one unit of work and makes its reply.
func (c *conn) serve(j *job) *reply {
	q := &j.q
	if c.dead.Load() {
		blk.PutBuf(j.buf)
		return c.failure(q, nbdwire.ESHUTDOWN, "connection is closed")
	}
	r, w, err := c.begin()
	if err != nil {
		blk.PutBuf(j.buf)
		return c.failure(q, nbdwire.Errno(err), "request was not started")
	}
	defer c.end(r, w)
	msg := msgWrite
	switch q.Cmd {
	case nbdwire.CmdRead:
		return c.serveRead(r, q)
	case nbdwire.CmdBlockStatus:
		return c.serveStatus(r, q)
	case nbdwire.CmdWrite:
		err = c.dev.WriteAt(r, blk.Buf(j.buf.B), int64(q.Off), c.writeFlags(q))
		blk.PutBuf(j.buf)
	case nbdwire.CmdCache:
		err, msg = c.dev.Prefetch(r, int64(q.Off), int64(q.Len)), msgCache
	default:
		msg, err = c.doControl(r, q)
	}
	if err != nil {
		return c.failure(q, nbdwire.Errno(err), msg)
	}
	p := newReply()
	p.head = nbdwire.AppendSimple(p.head, q.Cookie, 0)
	return p
}

// begin waits for a worker of the export's group and for the gate, and enters both. Nobody waits for one of them
// while holding the other: a drained device does not take the workers of others.
func (c *conn) begin() (*blk.Req, export.Workers, error) {
	for {
		var w export.Workers
		if f := c.exp.spec.Workers; f != nil {
			w = f()
		}
		if w == nil {
			r, err := c.dev.Begin(c.ctx)
			return r, nil, err
		}
		if err := w.Enter(c.ctx); err != nil {
			return nil, nil, err
		}
		if r := c.dev.TryBegin(); r != nil {
			return r, w, nil
		}
		w.Leave()
		r, err := c.dev.Begin(c.ctx)
		if err != nil {
			return nil, nil, err
		}
		c.dev.End(r) // the gate is open again
	}
}

func (c *conn) end(r *blk.Req, w export.Workers) {
	c.dev.End(r)
	if w != nil {
		w.Leave()
	}
}

func (c *conn) failure(q *nbdwire.Request, errno uint32, msg string) *reply {
	p := newReply()
	p.head = appendFailure(p.head, c.structured, q.Cookie, errno, msg)
	return p
}

// serveRead reads; with structured replies and where it may be worth it, holes are told
// as such, as block-status finds them.
func (c *conn) serveRead(r *blk.Req, q *nbdwire.Request) *reply {
	n := int(q.Len)
	if q.Flags&nbdwire.CmdFlagFUA != 0 {
		if err := c.dev.Flush(r); err != nil {
			return c.failure(q, nbdwire.Errno(err), msgFlush)
		}
	}
	if c.structured && q.Flags&nbdwire.CmdFlagDF == 0 && n >= mapMin {
		return c.serveSparse(r, q)
	}
	p := newReply()
	p.head = appendReadHead(p.head, c.structured, q, n)
	if n == 0 {
		return p
	}
	p.buf = c.buffer(n)
	if err := c.dev.ReadAt(r, blk.Buf(p.buf.B), int64(q.Off), 0); err != nil {
		blk.PutBuf(p.buf)
		p.buf = nil
		p.head = appendFailure(p.head[:0], c.structured, q.Cookie, nbdwire.Errno(err), msgRead)
		return p
	}
	p.data = p.buf.B
	return p
}

// serveSparse answers a read in chunks of data and holes.
func (c *conn) serveSparse(r *blk.Req, q *nbdwire.Request) *reply {
	first := newReply()
	last := first
	off, end := int64(q.Off), int64(q.Off)+int64(q.Len)
	fail := func(err error, msg string) *reply {
		last.head = nbdwire.AppendErrorOffset(last.head, q.Cookie, nbdwire.Errno(err), uint64(off), msg)
		return first
	}
	x, err := c.status(r, off, end-off)
	for off < end {
		if err != nil {
			return fail(err, "unable to check for holes: "+blk.ErrnoText(err))
		}
		zero, n := x.Zero, x.N
		// Status answers in the units of each layer: join what belongs together.
		for off+n < end {
			if x, err = c.status(r, off+n, end-off-n); err != nil || x.Zero != zero {
				break
			}
			n += x.N
		}
		var flags uint16
		if off+n == end {
			flags = nbdwire.ChunkDone
		}
		if zero {
			last.head = nbdwire.AppendHole(last.head, flags, q.Cookie, uint64(off), uint32(n))
			off += n
			continue
		}
		buf := c.buffer(int(n))
		if err := c.dev.ReadAt(r, blk.Buf(buf.B), off, 0); err != nil {
			blk.PutBuf(buf)
			return fail(err, msgRead)
		}
		last.head = nbdwire.AppendDataHead(last.head, flags, q.Cookie, uint64(off), int(n))
		last.buf, last.data = buf, buf.B
		if off += n; off < end {
			last.next = newReply()
			last = last.next
		}
	}
	return first
}

// status is Device.Status where the end of a device that became shorter is an error.
func (c *conn) status(r *blk.Req, off, n int64) (blk.Extent, error) {
	x, err := c.dev.Status(r, off, n)
	if err == nil && x.N <= 0 {
		err = blk.ErrOutOfRange
	}
	return x, err
}

// maxExtents bounds the extents of one context in a reply: 1 MiB of them.
const maxExtents = 1 << 20 / nbdwire.ExtentSize

// serveStatus answers a block-status request for the contexts the client chose.
func (c *conn) serveStatus(r *blk.Req, q *nbdwire.Request) *reply {
	limit := maxExtents
	if q.Flags&nbdwire.CmdFlagReqOne != 0 {
		limit = 1
	}
	p := newReply()
	p.head = make([]byte, 0, 64)
	left := c.ctxs.count()
	add := func(id uint32, ask func(off, n int64) (int64, uint32, error)) error {
		es, err := extents(int64(q.Off), int64(q.Len), limit, ask)
		if err != nil {
			return err
		}
		var flags uint16
		if left--; left == 0 {
			flags = nbdwire.ChunkDone
		}
		p.head = nbdwire.AppendBlockStatus(p.head, flags, q.Cookie, id, es)
		return nil
	}
	var err error
	if c.ctxs.allocation {
		err = add(idAllocation, func(off, n int64) (int64, uint32, error) {
			x, err := c.status(r, off, n)
			var f uint32
			if !x.Data {
				f |= nbdwire.StateHole
			}
			if x.Zero {
				f |= nbdwire.StateZero
			}
			return x.N, f, err
		})
	}
	if err == nil && c.ctxs.depth {
		err = add(idDepth, func(off, n int64) (int64, uint32, error) {
			x, err := c.status(r, off, n)
			return x.N, uint32(x.Depth), err
		})
	}
	for i := 0; err == nil && i < len(c.ctxs.bitmaps); i++ {
		if c.ctxs.bitmaps[i] {
			bits := c.exp.spec.Bitmaps[i].Bits
			err = add(idBitmap+uint32(i), func(off, n int64) (int64, uint32, error) {
				switch at, k, ok := bits.NextDirty(off, off+n); {
				case !ok:
					return n, 0, nil
				case at > off:
					return at - off, 0, nil
				default:
					return k, nbdwire.StateDirty, nil
				}
			})
		}
	}
	if err != nil {
		p.head = nbdwire.AppendError(p.head, q.Cookie, nbdwire.Errno(err), msgStatus)
	}
	return p
}

// extents asks about the range piece by piece, joining pieces with equal flags, until it is
// covered or more than limit extents would be needed.
func extents(off, n int64, limit int, ask func(off, n int64) (int64, uint32, error)) ([]nbdwire.Extent, error) {
	var es []nbdwire.Extent
	for n > 0 {
		k, f, err := ask(off, n)
		if err != nil {
			return nil, err
		}
		if l := len(es) - 1; l >= 0 && es[l].Flags == f && int64(es[l].N)+k <= math.MaxUint32 {
			es[l].N += uint32(k)
		} else {
			if len(es) == limit {
				break
			}
			es = append(es, nbdwire.Extent{N: uint32(k), Flags: f})
		}
		off, n = off+k, n-k
	}
	return es, nil
}
