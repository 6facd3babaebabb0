package daemon

import (
	"encoding/binary"
	"fmt"
	"io"
	"syscall"
	"time"

	"qblockd/blockdev/nbdwire"
)

// Status is a client of an export that asks for nothing but block status. It is used by one
// goroutine.
type Status struct {
	conn
	cookie   uint64
	Size     int64
	Contexts map[uint32]string
}

// DialStatus connects to an export and asks for the meta contexts; which of them there are stands
// in Contexts.
func DialStatus(socket, export string, deadline time.Time, contexts ...string) (*Status, error) {
	s := &Status{Contexts: map[uint32]string{}}
	if err := s.dial(socket, deadline, func() error { return s.handshake(export, contexts) }); err != nil {
		return nil, err
	}
	return s, nil
}

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
func (s *Status) Ask(off, n int64) (map[string][]nbdwire.Extent, error) {
	s.cookie++
	q := nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Cookie: s.cookie, Off: uint64(off), Len: uint64(n)}
	if _, err := s.c.Write(q.Append(nil)); err != nil {
		return nil, err
	}
	out := map[string][]nbdwire.Extent{}
	var failed error
	for {
		var h [nbdwire.ChunkSize]byte
		if _, err := io.ReadFull(s.c, h[:]); err != nil {
			return nil, err
		}
		var r nbdwire.Reply
		if _, err := r.ParseReply(h[:]); err != nil || !r.Structured || r.Len > 1<<26 {
			return nil, fmt.Errorf("reply %x", h)
		}
		data := make([]byte, r.Len)
		if _, err := io.ReadFull(s.c, data); err != nil {
			return nil, err
		}
		switch {
		case r.Type>>15 != 0 && r.Len >= 4:
			failed = syscall.Errno(binary.BigEndian.Uint32(data))
		case r.Type == nbdwire.ChunkBlockStatus:
			id, extents, err := nbdwire.ParseBlockStatus(r.Type, data, nil)
			if err != nil {
				return nil, err
			}
			out[s.Contexts[id]] = append(out[s.Contexts[id]], extents...)
		}
		if r.Done() {
			return out, failed
		}
	}
}
