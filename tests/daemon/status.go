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

// Status is a client of an export that asks for nothing but block status. It is used by one
// goroutine.
type Status struct {
	c        net.Conn
	cookie   uint64
	Size     int64
	Contexts map[uint32]string
}

// Extent is one descriptor of a block status reply.
type Extent struct{ Length, Flags uint32 }

// DialStatus connects to an export and asks for the meta contexts; which of them there are stands
// in Contexts.
func DialStatus(socket, export string, deadline time.Time, contexts ...string) (*Status, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	s := &Status{c: c, Contexts: map[uint32]string{}}
	s.SetDeadline(deadline)
	if err := s.handshake(export, contexts); err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

// SetDeadline is until when requests wait for the daemon; the zero time is for ever.
func (s *Status) SetDeadline(t time.Time) { _ = s.c.SetDeadline(t) }

// Drop leaves without a word.
func (s *Status) Drop() { s.c.Close() }

func (s *Status) handshake(export string, contexts []string) error {
	var hello [nbdwire.GreetingSize]byte
	if _, err := io.ReadFull(s.c, hello[:]); err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = nbdwire.AppendOption(b, nbdwire.OptStructuredReply, nil)
	b = nbdwire.AppendOption(b, nbdwire.OptSetMetaContext, nbdwire.AppendMetaQueries(nil, export, contexts...))
	b = nbdwire.AppendOption(b, nbdwire.OptGo, (&nbdwire.InfoRequest{Name: export}).Append(nil))
	if _, err := s.c.Write(b); err != nil {
		return err
	}
	for {
		var h [nbdwire.OptReplySize]byte
		if _, err := io.ReadFull(s.c, h[:]); err != nil {
			return err
		}
		r, err := nbdwire.ParseOptReply(h[:])
		if err != nil {
			return err
		}
		data := make([]byte, r.Len)
		if _, err := io.ReadFull(s.c, data); err != nil {
			return err
		}
		switch {
		case r.Type>>31 != 0:
			return fmt.Errorf("option %d refused: %#x %s", r.Opt, r.Type, data)
		case r.Type == nbdwire.RepMetaContext && r.Len >= 4:
			s.Contexts[binary.BigEndian.Uint32(data)] = string(data[4:])
		case r.Type == nbdwire.RepInfo:
			if i, err := nbdwire.ParseInfo(data); err == nil && i.Type == nbdwire.InfoExport {
				s.Size = int64(i.Size)
			}
		case r.Opt == nbdwire.OptGo && r.Type == nbdwire.RepAck:
			return nil
		}
	}
}

// Ask returns the extents from off on, by context.
func (s *Status) Ask(off, n int64) (map[string][]Extent, error) {
	s.cookie++
	b := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, 7) // NBD_CMD_BLOCK_STATUS
	b = binary.BigEndian.AppendUint64(b, s.cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	if _, err := s.c.Write(b); err != nil {
		return nil, err
	}
	out := map[string][]Extent{}
	var failed error
	for {
		var h [20]byte
		if _, err := io.ReadFull(s.c, h[:]); err != nil {
			return nil, err
		}
		flags, kind, length := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint32(h[:]) != 0x668e33ef || length > 1<<26 {
			return nil, fmt.Errorf("reply %x", h)
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(s.c, data); err != nil {
			return nil, err
		}
		switch {
		case kind>>15 != 0 && length >= 4:
			failed = syscall.Errno(binary.BigEndian.Uint32(data))
		case kind == 5 && length >= 4: // NBD_REPLY_TYPE_BLOCK_STATUS
			name := s.Contexts[binary.BigEndian.Uint32(data)]
			for data = data[4:]; len(data) >= 8; data = data[8:] {
				out[name] = append(out[name], Extent{binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[4:])})
			}
		}
		if flags&1 != 0 {
			return out, failed
		}
	}
}
