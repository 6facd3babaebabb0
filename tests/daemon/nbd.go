package daemon

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// NBD is a simple client of an export: one request at a time, simple replies, no library in
// between. It is used by one goroutine.
type NBD struct {
	c      net.Conn
	handle uint64
	Size   int64
	Flags  uint16
}

const (
	nbdRead, nbdWrite, nbdDisc, nbdFlush, nbdTrim, nbdZeroes = 0, 1, 2, 3, 4, 6

	nbdFlagFUA, nbdFlagNoHole = 1 << 0, 1 << 1

	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698
)

// DialNBD connects to an export.
func (d *Daemon) DialNBD(export string) (*NBD, error) { return DialNBD(d.NBDSocket(), export) }

// DialNBD connects to an export of the server at a unix socket.
func DialNBD(socket, export string) (*NBD, error) { return DialNBDBy(socket, export, time.Time{}) }

// DialNBDBy is DialNBD with the deadline of SetDeadline.
func DialNBDBy(socket, export string, deadline time.Time) (*NBD, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	n := &NBD{c: c}
	n.SetDeadline(deadline)
	if err := n.handshake(export); err != nil {
		c.Close()
		return nil, err
	}
	return n, nil
}

func (n *NBD) handshake(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(n.c, hello[:]); err != nil {
		return err
	}
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" {
		return fmt.Errorf("greeting %q", hello[:16])
	}
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = append(b, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, 1) // NBD_OPT_EXPORT_NAME
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	if _, err := n.c.Write(b); err != nil {
		return err
	}
	var info [10]byte
	if _, err := io.ReadFull(n.c, info[:]); err != nil {
		return err
	}
	n.Size = int64(binary.BigEndian.Uint64(info[:]))
	n.Flags = binary.BigEndian.Uint16(info[8:])
	return nil
}

// do sends a request and reads its reply; out is the payload of a write, in the buffer of a read.
func (n *NBD) do(cmd, flags uint16, off int64, size int, out, in []byte) error {
	n.handle++
	b := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, n.handle)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	bufs := net.Buffers{b, out}
	if _, err := bufs.WriteTo(n.c); err != nil {
		return err
	}
	if cmd == nbdDisc {
		return nil
	}
	var h [16]byte
	if _, err := io.ReadFull(n.c, h[:]); err != nil {
		return err
	}
	if m := binary.BigEndian.Uint32(h[:]); m != nbdReplyMagic || binary.BigEndian.Uint64(h[8:]) != n.handle {
		return fmt.Errorf("reply %x", h)
	}
	if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
		return syscall.Errno(e)
	}
	_, err := io.ReadFull(n.c, in)
	return err
}

// ReadAt, WriteAt, Zero, Trim and Flush are the requests of those names.
func (n *NBD) ReadAt(p []byte, off int64) error  { return n.do(nbdRead, 0, off, len(p), nil, p) }
func (n *NBD) WriteAt(p []byte, off int64) error { return n.do(nbdWrite, 0, off, len(p), p, nil) }
func (n *NBD) Zero(off int64, size int) error    { return n.do(nbdZeroes, 0, off, size, nil, nil) }
func (n *NBD) Trim(off int64, size int) error    { return n.do(nbdTrim, 0, off, size, nil, nil) }
func (n *NBD) Flush() error                      { return n.do(nbdFlush, 0, 0, 0, nil, nil) }

// ReadAhead sends that many reads of size bytes from the beginning of the export at once, and reads
// the replies, in whatever order they come.
func (n *NBD) ReadAhead(count, size int) error {
	var b []byte
	for i := range count {
		b = binary.BigEndian.AppendUint32(b, nbdRequestMagic)
		b = binary.BigEndian.AppendUint32(b, nbdRead)
		b = binary.BigEndian.AppendUint64(b, uint64(i))
		b = binary.BigEndian.AppendUint64(b, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(size))
	}
	if _, err := n.c.Write(b); err != nil {
		return err
	}
	in := make([]byte, 16+size)
	for range count {
		if _, err := io.ReadFull(n.c, in); err != nil {
			return err
		}
		if m := binary.BigEndian.Uint32(in); m != nbdReplyMagic {
			return fmt.Errorf("reply %x", in[:16])
		}
		if e := binary.BigEndian.Uint32(in[4:]); e != 0 {
			return syscall.Errno(e)
		}
	}
	return nil
}

// WriteFUA and ZeroNoHole are WriteAt and Zero with the flag of that name.
func (n *NBD) WriteFUA(p []byte, off int64) error {
	return n.do(nbdWrite, nbdFlagFUA, off, len(p), p, nil)
}
func (n *NBD) ZeroNoHole(off int64, size int) error {
	return n.do(nbdZeroes, nbdFlagNoHole, off, size, nil, nil)
}

// SetDeadline is until when requests wait for the daemon; the zero time is for ever.
func (n *NBD) SetDeadline(t time.Time) { _ = n.c.SetDeadline(t) }

// Close ends the connection in order, Drop without a word.
func (n *NBD) Close() { _ = n.do(nbdDisc, 0, 0, 0, nil, nil); n.c.Close() }
func (n *NBD) Drop()  { n.c.Close() }
