package nbd

import (
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph"
	"qblockd/graph/blk"
)

var _ graph.CopyRanger = (*disk)(nil)

// mapMin is the length from which ranges of files are sent by sendfile, in bytes: below it a copy
// is cheaper than the additional system calls.
const mapMin = 64 << 10

// CopyFrom implements graph.CopyRanger: the kernel puts the pages of the files into the socket. It
// does so where all of them are in memory, so that who sends for everybody waits for no disk, and
// not under TLS.
//
// The socket refers to the pages until the server has taken them, which its answer tells. When the
// connection is lost before, a server that goes on with it may find there what was written to the
// file later.
func (d *disk) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	n, most, align := blk.Total(src), d.e.limits().MaxTransfer, d.e.limits().RequestAlign
	if n < mapMin || d.inside(off, n) < n {
		return blk.ErrNotSupported
	}
	for i := range src {
		if src[i].N%align != 0 || src[i].Direct || !inMemory(&src[i]) {
			return blk.ErrNotSupported
		}
	}
	q := nbdwire.Request{Cmd: nbdwire.CmdWrite}
	if f&blk.FUA != 0 && d.e.has(nbdwire.FlagFUA) {
		q.Flags = nbdwire.CmdFlagFUA
	}
	for _, h := range src {
		for left := h.N; left > 0; {
			h.N = min(left, most)
			q.Off, q.Len = uint64(off), uint64(h.N)
			if _, err := d.link.do(r, q, body{file: h}); err != nil {
				return err
			}
			off, h.Off, left = off+h.N, h.Off+h.N, left-h.N
		}
	}
	return nil
}

// inMemory tells whether all pages of a range of a file are in memory. Where the kernel does not
// tell they are not.
func inMemory(h *blk.HostRange) bool {
	page := int64(unix.Getpagesize())
	from, to := blk.Outer(h.Off, h.Off+h.N, page, h.Off+h.N)
	in := unix.CachestatRange{Off: uint64(from), Len: uint64(to - from)}
	var out unix.Cachestat_t
	err := unix.Cachestat(uint(h.FD), &in, &out, 0)
	return err == nil && int64(out.Cache) == blk.AlignUp(to-from, page)/page
}

// fileSender puts ranges of files into a socket. Its function is made once: one for each call would
// be an allocation.
type fileSender struct {
	raw  syscall.RawConn // nil: the connection takes none
	from blk.HostRange   // what is left
	put  func(fd uintptr) bool
}

// init prepares for nc; moved counts the bytes.
func (f *fileSender) init(nc net.Conn, moved *atomic.Int64) {
	s, ok := nc.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return
	}
	f.raw = raw
	f.put = func(fd uintptr) bool {
		for f.from.N > 0 {
			n, err := unix.Sendfile(int(fd), f.from.FD, &f.from.Off, int(min(f.from.N, 1<<30)))
			switch {
			case n > 0:
				f.from.N -= int64(n)
				moved.Add(int64(n))
			case err == unix.EAGAIN:
				return false
			case err != unix.EINTR:
				return true // an error of either side, or the file ends here
			}
		}
		return true
	}
}

// send puts h into the socket. short: the file has less, or cannot be read, and zeroes stand for
// the rest, as the server was told of the length already.
func (f *fileSender) send(nc net.Conn, h blk.HostRange) (short bool, err error) {
	f.from = h
	if err = f.raw.Write(f.put); err != nil || f.from.N == 0 {
		return false, err
	}
	for f.from.N > 0 {
		n, err := nc.Write(blk.Zeroes(int(min(f.from.N, sendPiece))))
		if f.from.N -= int64(n); err != nil {
			return true, err
		}
	}
	return true, nil
}
