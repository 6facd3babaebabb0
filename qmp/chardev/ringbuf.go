package chardev

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

// maxRing bounds what a client can make the daemon hold in one ring buffer, maxRings in all of a
// table, in bytes.
const (
	maxRing  = 64 << 20
	maxRings = 256 << 20
)

// ringbuf keeps the last bytes written to it. Memory is taken as it fills.
type ringbuf struct {
	*front
	name string // what filename shows: the kind under which it was made
	size int
	all  *atomic.Int64 // of the table: what its ring buffers may hold

	mu sync.Mutex
	// len(data) <= size; grows to size, then is written round
	data []byte // +checklocks:mu
	// index of the oldest byte
	from int // +checklocks:mu
	// bytes held
	n int // +checklocks:mu
}

func newRingbuf(o *types.ChardevRingbuf, name string, f *front, all *atomic.Int64) (device, error) {
	size := int64(65536)
	if o.Size != nil {
		size = *o.Size
	}
	switch {
	case size <= 0, size&(size-1) != 0:
		return nil, errors.New("size of ringbuf chardev must be power of two")
	case size > maxRing:
		return nil, fmt.Errorf("size of ringbuf chardev must be at most %d", maxRing)
	}
	if all.Add(size) > maxRings {
		all.Add(-size)
		return nil, fmt.Errorf("ringbuf chardevs hold at most %d bytes together", maxRings)
	}
	r := &ringbuf{front: f, name: name, size: int(size), all: all}
	r.spawn(func() { r.serve(&ringStream{r: r, gone: make(chan struct{})}) })
	return r, nil
}

// ringStream is a ring buffer as its user sees it: it takes everything and says nothing.
type ringStream struct {
	r    *ringbuf
	once sync.Once
	gone chan struct{} // closed by Close
}

func (s *ringStream) Write(b []byte) (int, error) {
	s.r.write(b)
	return len(b), nil
}

func (s *ringStream) Read([]byte) (int, error) {
	<-s.gone
	return 0, io.EOF
}

func (s *ringStream) Close() error {
	s.once.Do(func() { close(s.gone) })
	return nil
}

func (r *ringbuf) filename() string { return r.name }
func (r *ringbuf) close() {
	r.end()
	r.all.Add(-int64(r.size))
}

func (r *ringbuf) write(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(b) > r.size {
		b = b[len(b)-r.size:]
	}
	// Room is made by doubling, in one piece: with the oldest byte first.
	if need := min(r.n+len(b), r.size); need > len(r.data) {
		size := max(len(r.data), 256)
		for size < need {
			size *= 2
		}
		grown := make([]byte, min(size, r.size))
		r.copyOut(grown[:r.n])
		r.data, r.from = grown, 0
	}
	for len(b) > 0 {
		at := (r.from + r.n) % len(r.data)
		k := copy(r.data[at:], b)
		b = b[k:]
		if r.n += k; r.n > len(r.data) {
			r.from = (r.from + r.n - len(r.data)) % len(r.data)
			r.n = len(r.data)
		}
	}
}

// copyOut copies the oldest len(b) bytes, of which there are enough.
//
// +checklocks:r.mu
func (r *ringbuf) copyOut(b []byte) {
	if len(b) > 0 {
		k := copy(b, r.data[r.from:])
		copy(b[k:], r.data)
	}
}

func (r *ringbuf) read(size int64) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := make([]byte, min(size, int64(r.n)))
	r.copyOut(b)
	if r.n -= len(b); r.n > 0 {
		r.from = (r.from + len(b)) % len(r.data)
	}
	return b
}

// ring finds the ring buffer called id.
func (t *Table) ring(id string) (*ringbuf, error) {
	d := t.find(id)
	if d == nil {
		return nil, fmt.Errorf("Device '%s' not found", id)
	}
	r, ok := d.(*ringbuf)
	if !ok {
		return nil, fmt.Errorf("%s is not a ringbuf device", id)
	}
	return r, nil
}

func isBase64(f *types.DataFormat) bool { return f != nil && *f == types.DataFormatBase64 }

// RingbufWrite appends data to the ring buffer called id: ringbuf-write.
func (t *Table) RingbufWrite(id, data string, format *types.DataFormat) error {
	r, err := t.ring(id)
	if err != nil {
		return err
	}
	b := []byte(data)
	if isBase64(format) {
		if b, err = value.Base64(data); err != nil {
			return err
		}
	}
	r.write(b)
	return nil
}

// RingbufHas is how many bytes ringbuf-read would find; 0 if there is no such buffer.
func (t *Table) RingbufHas(id string) int64 {
	r, err := t.ring(id)
	if err != nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return int64(r.n)
}

// RingbufRead takes up to size bytes out of the ring buffer called id: ringbuf-read. As text
// they end at a zero byte.
func (t *Table) RingbufRead(id string, size int64, format *types.DataFormat) (string, error) {
	r, err := t.ring(id)
	switch {
	case err != nil:
		return "", err
	case size <= 0:
		return "", errors.New("size must be greater than zero")
	}
	b := r.read(size)
	if isBase64(format) {
		return base64.StdEncoding.EncodeToString(b), nil
	}
	text, _, _ := strings.Cut(string(b), "\x00")
	return text, nil
}
