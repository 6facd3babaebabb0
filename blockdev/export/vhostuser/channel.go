package vhostuser

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
)

// channel is the connection of a front end: messages in, replies out. It is the message loop's.
type channel struct {
	nc  *net.UnixConn
	in  [vhostwire.HeaderSize + vhostwire.MaxPayload]byte
	oob []byte
	out []byte
	msg vhostwire.Message
	fds descriptors // that came with msg
}

// descriptors are those that came with a message and that nobody has taken yet.
type descriptors []int

// take is the first one; there is one.
func (d *descriptors) take() int {
	fd := (*d)[0]
	*d = (*d)[1:]
	return fd
}

// close closes those that are left.
func (d *descriptors) close() {
	for _, fd := range *d {
		unix.Close(fd)
	}
	*d = (*d)[:0]
}

func newChannel(nc *net.UnixConn) *channel {
	// Room for one descriptor more would hide that there are too many: MSG_CTRUNC tells.
	return &channel{nc: nc, oob: make([]byte, unix.CmsgSpace(4*vhostwire.MaxFDs))}
}

// read takes the next message into msg and fds, which are its until the next call. io.EOF: the
// front end has hung up between messages. After any error the connection is of no use, and no
// descriptor is left open.
func (c *channel) read() (h vhostwire.Header, err error) {
	c.fds.close()
	defer func() {
		if err != nil {
			c.fds.close()
		}
	}()
	if err = c.fill(c.in[:vhostwire.HeaderSize]); err != nil {
		return h, err
	}
	if h, err = vhostwire.ParseHeader(c.in[:]); err != nil {
		return h, err
	}
	payload := c.in[vhostwire.HeaderSize:][:h.Size]
	if err = c.fill(payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return h, err
	}
	return h, c.msg.Parse(h, payload, len(c.fds))
}

// fill fills b, and adds descriptors that come with that to fds.
func (c *channel) fill(b []byte) error {
	for at := 0; at < len(b); {
		n, oobn, flags, _, err := c.nc.ReadMsgUnix(b[at:], c.oob)
		if oobn > 0 {
			if err := c.adopt(c.oob[:oobn]); err != nil {
				return err
			}
		}
		switch {
		case err != nil:
			return err
		case flags&unix.MSG_CTRUNC != 0 || len(c.fds) > vhostwire.MaxFDs:
			return errors.New("a message has too many file descriptors")
		case n == 0 && at > 0:
			return io.ErrUnexpectedEOF
		case n == 0:
			return io.EOF
		}
		at += n
	}
	return nil
}

// adopt adds the descriptors of a control message to fds. The kernel has set close-on-exec.
func (c *channel) adopt(oob []byte) error {
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for i := range list {
		if list[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&list[i])
		if err != nil {
			return err
		}
		c.fds = append(c.fds, fds...)
	}
	return nil
}

// reply sends b, with a descriptor unless fd is -1.
func (c *channel) reply(b []byte, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	n, _, err := c.nc.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.nc.Write(b[n:])
	}
	return err
}
