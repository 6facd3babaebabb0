package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/events/trace"
	"qblockd/graph/blk"
)

// reader takes a connection's requests from the socket, many with one system call, and serves those
// that need no waiting; the others it hands to the workers, waiting while too much is under way. It
// lives in one goroutine at a time, to which all its fields belong: it has no lock.
type reader struct {
	*conn
	buf  *blk.Buffer
	in   []byte // of buf; [r:w) is read but not parsed
	r, w int
	// eager: the last request was a write larger than the buffer; read little more than the
	// next header, so that its payload goes where it belongs without a copy.
	eager bool
	// inside is the unit of work of the request that is served in line.
	inside *blk.Req
	probe  probe
	alone  alone
}

// inSize is the size of the buffer for requests and payloads of small writes, in bytes.
const inSize = 256 << 10

func newReader(c *conn) *reader {
	r := &reader{conn: c, buf: blk.GetBuf(inSize, 0)}
	r.in = r.buf.B
	r.alone.init(r)
	return r
}

// end gives back what run has left.
func (r *reader) end() {
	if r.inside != nil {
		r.leave() // after a panic
	}
	blk.PutBuf(r.buf)
}

// run serves requests until the client is done (nil), the connection fails or is killed.
func (r *reader) run() error {
	var q nbdwire.Request
	size := r.form.RequestSize()
	for {
		if err := r.fill(size); err != nil {
			return err
		}
		if r.dead.Load() {
			return net.ErrClosed
		}
		b := r.in[r.r : r.r+size]
		r.r += size
		if r.form.ParseRequest(b, &q) != nil {
			err := fmt.Errorf("invalid magic (got 0x%x)", binary.BigEndian.Uint32(b))
			r.refuse(&q, err)
			r.sender.flush()
			return err
		}
		if p := &trace.NBDRequest; p.On() {
			p.Log(slog.String("export", r.exp.spec.Name), slog.Int("command", int(q.Cmd)), slog.Uint64("offset", q.Off),
				slog.Uint64("length", q.Len), slog.Int("flags", int(q.Flags)))
		}
		if q.Cmd == nbdwire.CmdDisc {
			return r.sender.flush()
		}
		if err := r.request(&q); err != nil {
			return err
		}
	}
}

// fill reads until n bytes are buffered. It sends what is gathered before it may have to wait.
func (r *reader) fill(n int) error {
	if r.w-r.r >= n {
		return nil
	}
	if err := r.sender.flush(); err != nil {
		return err
	}
	if r.r > 0 && (r.r == r.w || len(r.in)-r.r < n) {
		copy(r.in, r.in[r.r:r.w])
		r.w -= r.r
		r.r = 0
	}
	for r.w-r.r < n {
		end := len(r.in)
		if r.eager {
			end = min(end, r.r+4096)
		}
		k, err := r.nc.Read(r.in[r.w:end])
		if err != nil {
			return err
		}
		r.w += k
	}
	return nil
}

// readFull fills b with what the client has sent next.
func (r *reader) readFull(b []byte) error {
	n := copy(b, r.in[r.r:r.w])
	r.r += n
	_, err := io.ReadFull(r.nc, b[n:])
	return err
}

// skip drops n bytes from the client. It sends what is gathered before it may have to wait.
func (r *reader) skip(n int64) error {
	k := min(n, int64(r.w-r.r))
	r.r += int(k)
	if k == n {
		return nil
	}
	if err := r.sender.flush(); err != nil {
		return err
	}
	_, err := io.CopyN(io.Discard, r.nc, n-k)
	return err
}

// enter passes the gate for a request that is served in line, or returns nil where that would have
// to wait. The request must not wait from then on.
func (r *reader) enter() *blk.Req {
	if r.exp.spec.Errors.Stopped() != nil {
		return nil
	}
	if r.inside = r.dev.TryBegin(); r.inside != nil {
		r.inside.NoWait = true
	}
	return r.inside
}

// leave ends what enter began.
func (r *reader) leave() {
	q := r.inside
	r.inside, q.NoWait = nil, false
	r.dev.End(q)
}

// refuse answers q with EINVAL without asking the device.
func (r *reader) refuse(q *nbdwire.Request, why error) { r.fail(q, nbdwire.EINVAL, why.Error()) }

// fail gathers the error reply to q.
func (r *reader) fail(q *nbdwire.Request, errno uint32, msg string) {
	s := &r.sender
	s.reserve(nbdwire.MaxReplyHead + len(msg))
	s.batch = r.form.AppendError(s.batch, q, errno, msg)
}

// answer gathers the reply to q, which has no data; where q would have to wait, a worker gets it.
func (r *reader) answer(q *nbdwire.Request, buf *blk.Buffer, err error, msg string) error {
	switch {
	case err == nil:
		r.sender.reserve(nbdwire.MaxReplyHead)
		r.sender.batch = r.form.AppendSuccess(r.sender.batch, q)
	case errors.Is(err, blk.ErrWouldBlock):
		return r.dispatch(q, buf)
	default:
		r.fail(q, nbdwire.Errno(err), msg)
	}
	blk.PutBuf(buf)
	return nil
}

// dispatch hands q to a worker. buf becomes the worker's.
func (r *reader) dispatch(q *nbdwire.Request, buf *blk.Buffer) error {
	j := newJob(q, buf, r.cost(q))
	j.ctxs = r.ctxs
	return r.hand(j)
}

// hand hands j to a worker, waiting while too much is under way.
func (r *reader) hand(j *job) error {
	if r.isAlone(j.cost) {
		return r.serveAlone(j)
	}
	if err := r.waitRoom(j.cost); err != nil {
		j.free()
		return err
	}
	r.workers.put(j)
	return nil
}

// waitRoom waits until n more bytes may be under way; what is gathered is sent before that.
func (r *reader) waitRoom(n int64) error {
	if r.workers.fits(n) {
		return nil
	}
	if err := r.sender.flush(); err != nil {
		return err
	}
	r.workers.waitFor(n)
	return nil
}

// request serves q, whose header has been taken from the buffer. An error ends the connection.
func (r *reader) request(q *nbdwire.Request) error {
	r.eager = false
	payload := r.payload(q)
	if q.Len > nbdwire.MaxPayload && (payload > 0 || r.isBounded(q.Cmd)) {
		err := fmt.Errorf("len (%d ) is larger than max len (%d)", q.Len, nbdwire.MaxPayload)
		r.refuse(q, err)
		if payload == 0 {
			return nil
		}
		// Nobody reads a payload of that size to keep the stream in order.
		r.sender.flush()
		return err
	}
	if payload > 0 && q.Cmd != nbdwire.CmdWrite {
		return r.withPayload(q)
	}
	if err := r.check(q); err != nil {
		if q.Cmd == nbdwire.CmdWrite {
			if err := r.skip(int64(q.Len)); err != nil {
				return err
			}
		}
		r.refuse(q, err)
		return nil
	}
	switch q.Cmd {
	case nbdwire.CmdRead:
		return r.read(q)
	case nbdwire.CmdWrite:
		return r.write(q)
	case nbdwire.CmdFlush, nbdwire.CmdTrim, nbdwire.CmdWriteZeroes:
		return r.control(q)
	}
	return r.dispatch(q, nil)
}

// withPayload serves a request that is no write and has a payload all the same. One there is: the
// question for the block status in some of the contexts.
func (r *reader) withPayload(q *nbdwire.Request) error {
	n := int(q.Len)
	if q.Cmd != nbdwire.CmdBlockStatus || n > nbdwire.StatusPayloadSize(len(r.ctxs)) {
		if err := r.skip(int64(n)); err != nil {
			return err
		}
		r.refuse(q, r.badPayload(q))
		return nil
	}
	if err := r.fill(n); err != nil { // so many contexts fit into the buffer
		return err
	}
	ctxs, ok := r.choose(q, r.in[r.r:r.r+n])
	r.r += n
	if !ok {
		r.refuse(q, r.badPayload(q))
		return nil
	}
	if err := r.check(q); err != nil {
		r.refuse(q, err)
		return nil
	}
	j := newJob(q, nil, r.cost(q))
	j.ctxs = ctxs
	return r.hand(j)
}

// read serves a read at once if that takes no waiting.
func (r *reader) read(q *nbdwire.Request) error {
	n := int(q.Len)
	if q.Flags&nbdwire.CmdFlagFUA != 0 {
		return r.dispatch(q, nil)
	}
	if n >= mapMin {
		if r.unix && !r.tls && r.readMapped(q) {
			return nil
		}
		return r.dispatch(q, nil)
	}
	head := r.form.ReadHeadSize()
	s := &r.sender
	s.reserve(head + n)
	u := r.enter()
	if u == nil {
		return r.dispatch(q, nil)
	}
	var err error
	if l := len(s.batch) + head; n > 0 {
		err = r.dev.ReadAt(u, blk.Buf(s.batch[l:l+n:l+n]), int64(q.Off), 0)
	}
	r.leave()
	switch {
	case err == nil:
		s.batch = r.appendReadHead(s.batch, q, n)
		s.batch = s.batch[:len(s.batch)+n]
	case errors.Is(err, blk.ErrWouldBlock):
		return r.dispatch(q, nil)
	default:
		r.fail(q, nbdwire.Errno(err), msgRead)
	}
	return nil
}

// readMapped answers q by sendfile if the device maps the whole range without waiting.
func (r *reader) readMapped(q *nbdwire.Request) bool {
	start := time.Now()
	u := r.enter()
	if u == nil {
		return false
	}
	m := mappingPool.Get().(*blk.Mapping)
	ok := r.mapRange(u, q, m)
	r.leave()
	if !ok || q.Len < streamMin && !r.probe.resident(m) {
		m.Release()
		mappingPool.Put(m)
		return false
	}
	r.sender.sendMapped(q, m)
	r.dev.Mapped(int64(q.Len), time.Since(start))
	return true
}

// overlapMin is the payload from which on a worker writes it while the connection takes the next
// one from the socket: two copies by two processors. Below, handing over costs more than it gains;
// so it does where the client and the connection keep all processors busy already (up to two of
// them): there the data are written at once, while they are in the cache.
const overlapMin = 256 << 10

// write serves a write at once if that takes no waiting; its payload is taken from the
// client in any case.
func (r *reader) write(q *nbdwire.Request) error {
	n := int(q.Len)
	var buf *blk.Buffer
	var data []byte
	if r.w-r.r >= n {
		data = r.in[r.r : r.r+n : r.r+n]
		r.r += n
	} else {
		// Whoever cannot send its payload before it got replies gets them.
		if err := r.sender.flush(); err != nil {
			return err
		}
		if err := r.waitRoom(int64(n)); err != nil {
			return err
		}
		r.eager = n >= inSize/2
		buf = r.srv.buffer(n)
		data = buf.B
		if err := r.readFull(data); err != nil {
			blk.PutBuf(buf)
			return err
		}
	}
	err := blk.ErrWouldBlock
	if n < r.srv.overlap {
		if u := r.enter(); u != nil {
			err = nil
			if n > 0 {
				err = r.dev.WriteAt(u, blk.Buf(data), int64(q.Off), r.flags(q))
			}
			r.leave()
		}
	}
	if buf == nil && errors.Is(err, blk.ErrWouldBlock) {
		buf = blk.GetBuf(n, 0)
		copy(buf.B, data)
	}
	return r.answer(q, buf, err, msgWrite)
}

// control serves a flush, trim or write-zeroes at once if that takes no waiting.
func (r *reader) control(q *nbdwire.Request) error {
	// A trim with FUA is two operations; the second may turn out to wait when the first is done. So
	// it is with pieces.
	if q.Cmd == nbdwire.CmdTrim && q.Flags&nbdwire.CmdFlagFUA != 0 || q.Len > pieceMax(q.Cmd) {
		return r.dispatch(q, nil)
	}
	u := r.enter()
	if u == nil {
		return r.dispatch(q, nil)
	}
	msg, err := r.doControl(u, q)
	r.leave()
	return r.answer(q, nil, err, msg)
}
