package fuse

import (
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// mapMin is the length from which reads are mapped, in bytes: below it a copy costs less than the
// additional system calls.
const mapMin = 64 << 10

// streamMin is the length from which reads of files that are not cached are mapped, too, in bytes:
// the kernel reads ahead within one, and waits less often.
const streamMin = 512 << 10

// pipe takes data of files to the kernel without a copy to us and back: the head of a reply and
// pages of files go into it, and from there to /dev/fuse, where they are copied once, to where the
// client wants them. The pages are live until then: the mapping's lease is held as long. The zero
// value is no pipe yet.
type pipe struct {
	r, w  int
	size  int64 // bytes that fit; 0: there is none, -1: there can be none
	probe [1]byte
	m     blk.Mapping
}

// ready makes the pipe, if that has not been done; false if there is none that n bytes fit in.
func (p *pipe) ready(n int64) bool {
	if p.size == 0 {
		p.make()
	}
	const ends = 3 * pageSize // the head, and data that begin and end in the middle of a page
	return p.size >= n+ends
}

// maxRead is how much the kernel is to read with one request, in bytes: what a pipe can take.
func maxRead() int64 {
	var p pipe
	defer p.close()
	if p.ready(maxData) {
		return maxData
	}
	return maxData / 2 // without the right to more, pipes hold a MiB, and the head of the reply does not fit
}

func (p *pipe) make() {
	p.size = -1
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return
	}
	p.r, p.w = fds[0], fds[1]
	for size := 2 * maxData; size >= maxData/8; size /= 2 {
		if n, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, size); err == nil {
			p.size = int64(n)
			return
		}
	}
	p.close()
}

// close drops the pipe with what is in it; the next ready makes another one.
func (p *pipe) close() {
	if p.size != 0 {
		unix.Close(p.r)
		unix.Close(p.w)
		p.size = 0
	}
}

// fill puts b and the mapped ranges into the pipe; false if that cannot be done.
func (p *pipe) fill(b []byte) bool {
	if n, err := unix.Write(p.w, b); err != nil || n != len(b) {
		return false
	}
	for _, h := range p.m.Ranges {
		for h.N > 0 {
			n, err := unix.Splice(h.FD, &h.Off, p.w, nil, int(h.N), 0)
			switch {
			case err == unix.EINTR:
			case err != nil || n <= 0: // the file ends here, or the pipe is full
				return false
			default:
				h.N -= n
			}
		}
	}
	return true
}

// inMemory tells whether a byte of a file can be read without waiting.
func (p *pipe) inMemory(fd int, off int64) bool {
	_, err := unix.Preadv2(fd, [][]byte{p.probe[:]}, off, unix.RWF_NOWAIT)
	return err != unix.EAGAIN
}

// resident tells whether the mapped ranges can probably be read without waiting.
func (p *pipe) resident() bool {
	for i := range p.m.Ranges {
		h := &p.m.Ranges[i]
		if !p.inMemory(h.FD, h.Off) || !p.inMemory(h.FD, h.Off+h.N-1) {
			return false
		}
	}
	return true
}

// mapRange maps a range; false if that cannot be done in full, or not from files in the kernel's
// cache, or gives so many pieces that copying is cheaper.
func (r *reader) mapRange(off, n int64) bool {
	m := &r.pipe.m
	for got := int64(0); got < n; {
		if r.root.Map(r.unit, off+got, n-got, m) != nil {
			return false
		}
		now := m.N()
		if now <= got || int64(len(m.Ranges)) > 1+n/mapMin {
			return false
		}
		got = now
	}
	for i := range m.Ranges {
		if h := &m.Ranges[i]; h.FD < 0 || h.Direct {
			return false
		}
	}
	return m.N() == n
}

// readMapped performs a read by splice and answers it. false: nothing has happened. With NoWait err
// may be blk.ErrWouldBlock.
func (r *reader) readMapped(off, n int64) (done bool, err error) {
	if r.export.Errors.CoversReads() || !r.pipe.ready(n) {
		return false, nil // errors turn up when it is too late to do something about them
	}
	start := time.Now()
	p := &r.pipe
	defer p.m.Release()
	if !r.mapRange(off, n) {
		return false, nil
	}
	if r.unit.NoWait && !p.resident() {
		return false, blk.ErrWouldBlock
	}
	if !r.unit.NoWait && n < streamMin && !p.resident() {
		return false, nil
	}
	head := r.reply[:outHeaderSize]
	putHead(head, r.q.unique, 0, int(n))
	if !p.fill(head) {
		p.close()
		return false, nil
	}
	total := outHeaderSize + n
	sent, err := unix.Splice(p.r, nil, r.dev, nil, int(total), 0)
	if sent != total {
		p.close()
	}
	if err != nil && err != unix.ENOENT && err != unix.ENODEV {
		return false, nil // the request is still there
	}
	r.root.Mapped(n, time.Since(start))
	return true, nil
}
