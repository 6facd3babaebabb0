package tlspsk

import (
	"errors"
	"net"
	"sync"
	"time"
)

const (
	// roomy is what one record of data may take with another key before it.
	roomy = maxPlain + overhead + 64
	// batch is how many records are sent at once.
	batch = 16
)

// Buffers in which records are made. They have records only, nothing secret.
var (
	small = sync.Pool{New: func() any { return &buffer{b: make([]byte, 0, roomy)} }}
	large = sync.Pool{New: func() any { return &buffer{b: make([]byte, 0, batch*roomy)} }}
)

type buffer struct{ b []byte }

// output is the direction to the peer.
type output struct {
	sync.Mutex
	half
	buf  *buffer // records to be sent; nil: none
	pool *sync.Pool
	one  [1][]byte // what Write writes
	err  error     // no record can be sent
	over bool      // the peer has been told of the end
}

// take gets a buffer for n bytes of data.
func (o *output) take(n int) {
	o.pool = &small
	if n > maxPlain {
		o.pool = &large
	}
	o.buf = o.pool.Get().(*buffer)
}

// drop gives the buffer back.
func (o *output) drop() {
	if o.buf != nil {
		o.buf.b = o.buf.b[:0]
		o.pool.Put(o.buf)
		o.buf = nil
	}
}

// end makes sure that nothing more is sent.
func (o *output) end(err error) {
	if o.err == nil {
		o.err = err
	}
	o.wipe()
}

// room tells whether another record of data fits, and a key before it.
func (o *output) room() bool { return cap(o.buf.b)-len(o.buf.b) >= roomy }

// add makes records of b, of any type but data.
func (o *output) add(typ byte, b []byte) {
	if o.buf == nil {
		o.take(len(b))
	}
	for len(b) > 0 {
		n := min(len(b), maxPlain)
		at := len(o.buf.b)
		o.buf.b = append(o.buf.b, make([]byte, headerLen)...)
		o.buf.b = append(o.buf.b, b[:n]...)
		o.sealFrom(typ, at)
		b = b[n:]
	}
}

// sealFrom makes a record of what is in the buffer from at.
func (o *output) sealFrom(typ byte, at int) {
	if typ == recordChangeCipherSpec { // always in the clear
		putHeader(o.buf.b[at:], typ, len(o.buf.b)-at-headerLen)
		return
	}
	rec := o.seal(typ, o.buf.b[at:])
	if &rec[0] != &o.buf.b[at] { // it was moved: a long message of a handshake
		o.buf.b = append(o.buf.b[:at], rec...)
		return
	}
	o.buf.b = o.buf.b[:at+len(rec)]
}

// flushLocked sends what is in the buffer.
func (c *Conn) flushLocked() error {
	o := &c.out
	if o.err == nil && len(o.buf.b) > 0 {
		if _, err := c.nc.Write(o.buf.b); err != nil {
			o.end(err)
		}
	}
	o.buf.b = o.buf.b[:0]
	return o.err
}

// alertLocked tells the peer something, as far as that can be done.
func (c *Conn) alertLocked(a Alert) error {
	level := byte(2)
	if a == CloseNotify {
		level = 1
	}
	c.out.drop()
	c.out.add(recordAlert, []byte{level, byte(a)})
	err := c.flushLocked()
	c.out.drop()
	return err
}

// complainLocked tells the peer why this end gives up.
func (c *Conn) complainLocked(err error) {
	var l *LocalError
	if errors.As(err, &l) && c.out.err == nil && !c.out.over {
		_ = c.alertLocked(l.Alert)
	}
}

// complain is for who reads. That the peer says no more does not keep us from it. Who writes is not
// waited for: it finds that it is over with its next records.
func (c *Conn) complain(err error) {
	var l *LocalError
	var r RemoteError
	if !errors.As(err, &l) && !errors.As(err, &r) {
		return
	}
	c.lost.Store(&err)
	if c.out.TryLock() {
		_ = c.nc.SetWriteDeadline(time.Now().Add(lastWords))
		c.loseLocked()
		c.out.Unlock() // +checklocksforce: TryLock
	}
}

// loseLocked ends the direction to the peer if who reads has found that it is over.
func (c *Conn) loseLocked() {
	if err := c.lost.Load(); err != nil && c.out.err == nil {
		c.complainLocked(*err)
		c.out.end(*err)
	}
}

var errOver = errors.New("the peer has been told that nothing more comes")

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	c.out.Lock()
	defer c.out.Unlock()
	c.out.one[0] = b
	n, err := c.writeLocked(c.out.one[:])
	c.out.one[0] = nil
	return int(n), err
}

// WriteVec writes what v has, in as few records and writes to the connection below as that takes.
// It changes nothing in v. After an error n bytes have been passed on, and nothing more can be
// written.
func (c *Conn) WriteVec(v net.Buffers) (n int64, err error) {
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	c.out.Lock()
	defer c.out.Unlock()
	return c.writeLocked(v)
}

func (c *Conn) writeLocked(v [][]byte) (n int64, err error) {
	o := &c.out
	c.loseLocked()
	switch {
	case o.err != nil:
		return 0, o.err
	case o.over:
		return 0, errOver
	}
	left := 0
	for _, b := range v {
		left += len(b)
	}
	if left == 0 {
		return 0, nil
	}
	o.take(left)
	defer o.drop()
	off, held := 0, 0
	for left > 0 {
		c.rekeyLocked()
		at, k := len(o.buf.b), min(left, maxPlain)
		o.buf.b = o.buf.b[:at+headerLen+k]
		for into := o.buf.b[at+headerLen:]; len(into) > 0; {
			m := copy(into, v[0][off:])
			into, off = into[m:], off+m
			if off == len(v[0]) {
				v, off = v[1:], 0
			}
		}
		o.sealFrom(recordData, at)
		left, held = left-k, held+k
		if left == 0 || !o.room() {
			if err := c.flushLocked(); err != nil {
				return n, err
			}
			n, held = n+int64(held), 0
			if c.loseLocked(); o.err != nil {
				return n, o.err
			}
		}
	}
	return n, nil
}

// rekeyLocked adds the news of another key when it is time for one.
func (c *Conn) rekeyLocked() {
	ask := c.asking.Load() && c.asking.Swap(false)
	owe := c.owed.Load() && c.owed.Swap(false)
	if !ask && !owe && c.out.seq < c.maxRecords {
		return
	}
	m := []byte{typeKeyUpdate, 0, 0, 1, 0}
	if ask {
		m[messageHeader] = updateRequested
	}
	c.out.add(recordHandshake, m)
	c.out.update()
}
