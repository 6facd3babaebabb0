package daemon

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"qblockd/blockdev/nbdwire"
)

// NBD is a simple client of an export: one request at a time, simple replies, no library in
// between. It is used by one goroutine.
type NBD struct {
	conn
	handle uint64
	Size   int64
	Flags  uint16
}

// conn is a connection to the daemon.
type conn struct{ c net.Conn }

// dial connects to a unix socket and does what comes first.
func (c *conn) dial(socket string, deadline time.Time, begin func() error) (err error) {
	if c.c, err = net.Dial("unix", socket); err != nil {
		return err
	}
	c.SetDeadline(deadline)
	if err = begin(); err != nil {
		c.Drop()
	}
	return err
}

// SetDeadline is until when everything that waits for the daemon waits; the zero time is for ever.
func (c *conn) SetDeadline(t time.Time) { _ = c.c.SetDeadline(t) }

// Drop leaves without a word.
func (c *conn) Drop() { c.c.Close() }

// DialNBD connects to an export.
func (d *Daemon) DialNBD(export string) (*NBD, error) { return DialNBD(d.NBDSocket(), export) }

// DialNBD connects to an export of the server at a unix socket.
func DialNBD(socket, export string) (*NBD, error) { return DialNBDBy(socket, export, time.Time{}) }

// DialNBDBy is DialNBD with the deadline of SetDeadline.
func DialNBDBy(socket, export string, deadline time.Time) (*NBD, error) {
	n := &NBD{}
	if err := n.dial(socket, deadline, func() error { return n.handshake(export) }); err != nil {
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
	b = nbdwire.AppendOption(b, nbdwire.OptExportName, []byte(export))
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
	q := nbdwire.Request{Flags: flags, Cmd: cmd, Cookie: n.handle, Off: uint64(off), Len: uint64(size)}
	bufs := net.Buffers{q.Append(nil), out}
	if _, err := bufs.WriteTo(n.c); err != nil {
		return err
	}
	if cmd == nbdwire.CmdDisc {
		return nil
	}
	handle, err := n.reply(in)
	if err == nil && handle != n.handle {
		err = fmt.Errorf("a reply to request %d", handle)
	}
	return err
}

// reply reads a reply and, unless it is an error, the data that fill in.
func (n *NBD) reply(in []byte) (handle uint64, err error) {
	var h [nbdwire.SimpleSize]byte
	if _, err := io.ReadFull(n.c, h[:]); err != nil {
		return 0, err
	}
	handle = binary.BigEndian.Uint64(h[8:])
	if m := binary.BigEndian.Uint32(h[:]); m != nbdwire.MagicSimple {
		return handle, fmt.Errorf("reply %x", h)
	}
	if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
		return handle, syscall.Errno(e)
	}
	_, err = io.ReadFull(n.c, in)
	return handle, err
}

// ReadAt, WriteAt, Zero, Trim and Flush are the requests of those names.
func (n *NBD) ReadAt(p []byte, off int64) error { return n.do(nbdwire.CmdRead, 0, off, len(p), nil, p) }
func (n *NBD) WriteAt(p []byte, off int64) error {
	return n.do(nbdwire.CmdWrite, 0, off, len(p), p, nil)
}
func (n *NBD) Zero(off int64, size int) error {
	return n.do(nbdwire.CmdWriteZeroes, 0, off, size, nil, nil)
}
func (n *NBD) Trim(off int64, size int) error { return n.do(nbdwire.CmdTrim, 0, off, size, nil, nil) }
func (n *NBD) Flush() error                   { return n.do(nbdwire.CmdFlush, 0, 0, 0, nil, nil) }

// ReadAhead sends that many reads of size bytes from the beginning of the export at once, and reads
// the replies, in whatever order they come.
func (n *NBD) ReadAhead(count, size int) error {
	var b []byte
	for i := range count {
		b = (&nbdwire.Request{Cmd: nbdwire.CmdRead, Cookie: uint64(i), Len: uint64(size)}).Append(b)
	}
	if _, err := n.c.Write(b); err != nil {
		return err
	}
	in := make([]byte, size)
	for range count {
		if _, err := n.reply(in); err != nil {
			return err
		}
	}
	return nil
}

// WriteFUA and ZeroNoHole are WriteAt and Zero with the flag of that name.
func (n *NBD) WriteFUA(p []byte, off int64) error {
	return n.do(nbdwire.CmdWrite, nbdwire.CmdFlagFUA, off, len(p), p, nil)
}
func (n *NBD) ZeroNoHole(off int64, size int) error {
	return n.do(nbdwire.CmdWriteZeroes, nbdwire.CmdFlagNoHole, off, size, nil, nil)
}

// Close ends the connection in order.
func (n *NBD) Close() { _ = n.do(nbdwire.CmdDisc, 0, 0, 0, nil, nil); n.Drop() }
