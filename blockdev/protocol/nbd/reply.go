package nbd

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

const (
	// maxStatus is how long a chunk with extents may be, in bytes; one extent was asked for.
	maxStatus = 1000
	// maxErrors is how many chunks with errors, maxGaps how many separate parts of the data an
	// answer may have.
	maxErrors, maxGaps = 1000, 1000
)

// protocolError is what a server has done that it must not: nothing it says can be relied on.
type protocolError string

func (e protocolError) Error() string { return "Protocol error: " + string(e) }

func breach(format string, a ...any) error { return protocolError(fmt.Sprintf(format, a...)) }

// readReply takes in a simple reply or one chunk of a structured one.
func (c *conn) readReply() error {
	p, err := c.replyHead()
	if err != nil {
		return err
	}
	s := c.find(p.Cookie)
	switch {
	case s == nil:
		return breach("reply to a request that is not under way")
	case p.Extended && p.Off != s.req.Off:
		return breach("reply to a request at %d instead of %d", p.Off, s.req.Off)
	case p.Structured:
		err = c.chunk(s, &p)
	default:
		err = c.simple(s, &p)
	}
	if err != nil || !p.Done() {
		return err
	}
	if err := s.complete(); err != nil {
		return err
	}
	if !c.answered.Load() {
		c.answered.Store(true)
	}
	c.moved.Add(progress)
	c.mu.Lock()
	c.open--
	if s.answered = true; s.sent {
		c.finishLocked(s)
	}
	if c.alone++; c.open > 0 {
		c.alone = 0
	}
	c.mu.Unlock()
	return nil
}

// replyHead reads the head of a reply.
func (c *conn) replyHead() (p nbdwire.Reply, err error) {
	b, err := c.in.Peek(nbdwire.SimpleSize)
	if err != nil {
		return p, err
	}
	n, err := nbdwire.ReplySize(b)
	if err != nil {
		return p, breach("invalid magic")
	}
	if c.e.extended != (n == nbdwire.ExtChunkSize) {
		return p, breach("extended headers are used in some messages only")
	}
	if b, err = c.in.Peek(n); err != nil {
		return p, err
	}
	if _, err = p.ParseReply(b); err != nil {
		return p, breach("invalid magic")
	}
	_, err = c.in.Discard(n) // it is buffered
	return p, err
}

// find is the slot of the request with a cookie, nil if it is not under way.
func (c *conn) find(cookie uint64) *slot {
	s := &c.slots[cookie%maxInFlight]
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.busy || s.answered || s.req.Cookie != cookie {
		return nil
	}
	return s
}

// complete checks that an answer that has no error has all that was asked for.
func (s *slot) complete() error {
	whole := span{0, int64(s.req.Len)}
	switch {
	case s.err != nil:
	case s.req.Cmd == nbdwire.CmdRead && (len(s.filled) != 1 || s.filled[0] != whole):
		return breach("the reply to a read of %d bytes does not have all of them", s.req.Len)
	case s.req.Cmd == nbdwire.CmdBlockStatus && s.extents == 0:
		return breach("Server did not reply with any status extents")
	}
	return nil
}

// simple takes in a simple reply.
func (c *conn) simple(s *slot, p *nbdwire.Reply) error {
	read := s.req.Cmd == nbdwire.CmdRead
	if c.e.structured && (read || s.req.Cmd == nbdwire.CmdBlockStatus) {
		return breach("simple reply when structured reply chunk was expected")
	}
	if p.Errno != 0 {
		s.err = nbdwire.FromErrno(p.Errno)
		return nil
	}
	if !read {
		return nil
	}
	n := int64(s.req.Len)
	s.filled = append(s.filled, span{0, n})
	return c.readInto(s.in, 0, n)
}

// chunk takes in a chunk of a structured reply.
func (c *conn) chunk(s *slot, p *nbdwire.Reply) error {
	if !c.e.structured {
		return breach("structured reply when simple reply was expected")
	}
	read := s.req.Cmd == nbdwire.CmdRead
	switch {
	case p.Type == nbdwire.ChunkNone:
		if !p.Done() {
			return breach("NBD_REPLY_TYPE_NONE chunk without NBD_REPLY_FLAG_DONE flag set")
		}
		if p.Len != 0 {
			return breach("NBD_REPLY_TYPE_NONE chunk with nonzero length")
		}
		return nil
	case p.Type == nbdwire.ChunkOffsetData && read:
		return c.dataChunk(s, p.Len)
	case p.Type == nbdwire.ChunkOffsetHole && read:
		return c.holeChunk(s, p.Len)
	case p.Type == nbdwire.ChunkBlockStatus && s.req.Cmd == nbdwire.CmdBlockStatus,
		p.Type == nbdwire.ChunkBlockStatusExt && s.req.Cmd == nbdwire.CmdBlockStatus && c.e.extended:
		return c.statusChunk(s, p)
	case p.Type&nbdwire.ChunkErrBit != 0:
		return c.errorChunk(s, p)
	}
	return breach("Unexpected reply type: %d for %s", p.Type, nbdwire.CmdName(s.req.Cmd))
}

// payload reads a small payload; it holds until the next call.
func (c *conn) payload(n uint64) ([]byte, error) {
	b, err := c.in.Peek(int(n))
	if err == nil {
		_, _ = c.in.Discard(int(n)) // it is buffered
	}
	return b, err
}

func (c *conn) dataChunk(s *slot, n uint64) error {
	if n <= 8 {
		return breach("invalid payload for NBD_REPLY_TYPE_OFFSET_DATA")
	}
	if n-8 > s.req.Len {
		return breach("server sent chunk exceeding requested region")
	}
	b, err := c.payload(8)
	if err != nil {
		return err
	}
	at, err := s.part(be64(b), n-8)
	if err != nil {
		return err
	}
	return c.readInto(s.in, at, int64(n-8))
}

func (c *conn) holeChunk(s *slot, n uint64) error {
	if n != 12 {
		return breach("invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE")
	}
	b, err := c.payload(n)
	if err != nil {
		return err
	}
	off, k, err := nbdwire.ParseHole(b)
	if err != nil || k == 0 {
		return breach("invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE")
	}
	at, err := s.part(off, uint64(k))
	if err == nil {
		s.in.Slice(at, int64(k)).Zero()
	}
	return err
}

// part is where in a read's buffer a chunk of n bytes from off on belongs. Chunks come in any
// order, but none has what another had.
func (s *slot) part(off uint64, n uint64) (at int64, err error) {
	begin, size := s.req.Off, s.req.Len
	if off < begin || off-begin > size || n > size-(off-begin) {
		return 0, breach("server sent chunk exceeding requested region")
	}
	x := span{int64(off - begin), int64(off-begin) + int64(n)}
	at = x.from
	i, _ := slices.BinarySearchFunc(s.filled, at, func(f span, at int64) int { return cmp.Compare(f.to, at) })
	j := i // those from i up to j become one with x
	if i < len(s.filled) && s.filled[i].to == at {
		x.from, j = s.filled[i].from, i+1
	}
	if j < len(s.filled) {
		switch f := s.filled[j]; {
		case f.from < x.to:
			return 0, breach("server sent some data twice")
		case f.from == x.to:
			x.to, j = f.to, j+1
		}
	}
	if s.filled = slices.Replace(s.filled, i, j, x); len(s.filled) > maxGaps {
		return 0, breach("server sent data in too many pieces")
	}
	return at, nil
}

func (c *conn) statusChunk(s *slot, p *nbdwire.Reply) error {
	if p.Len > maxStatus {
		return breach("Payload too large")
	}
	b, err := c.payload(p.Len)
	if err != nil {
		return err
	}
	var few [maxStatus / nbdwire.ExtentSize]nbdwire.Extent // one was asked for
	id, xs, err := nbdwire.ParseBlockStatus(p.Type, b, few[:0])
	switch {
	case err != nil:
		return breach("invalid payload for NBD_REPLY_TYPE_BLOCK_STATUS")
	case id != c.e.context:
		return breach("unexpected context id %d for NBD_REPLY_TYPE_BLOCK_STATUS, when negotiated context id is %d",
			id, c.e.context)
	case xs[0].N == 0:
		return breach("server sent status chunk with zero length")
	case s.extents > 0:
		return breach("Several BLOCK_STATUS chunks in reply")
	}
	s.extent, s.extents = xs[0], 1
	return nil
}

func (c *conn) errorChunk(s *slot, p *nbdwire.Reply) error {
	if p.Len < 6 || p.Len > 6+nbdwire.MaxString+8 {
		return breach("invalid payload for structured error")
	}
	b, err := c.payload(p.Len)
	if err != nil {
		return err
	}
	typ := p.Type
	if typ != nbdwire.ChunkErrorOffset {
		typ = nbdwire.ChunkError // others are to be taken for it
	}
	no, _, _, err := nbdwire.ParseError(typ, b)
	switch s.errs++; {
	case s.errs > maxErrors:
		return breach("server sent too many errors")
	case err != nil:
		return breach("server sent structured error chunk with incorrect message size")
	case no == 0:
		return breach("server sent structured error chunk with error = 0")
	}
	if s.err == nil {
		s.err = nbdwire.FromErrno(no)
	}
	return nil
}

// readInto fills [at, at+n) of v.
func (c *conn) readInto(v blk.Vec, at, n int64) error {
	c.parts = v.AppendTo(c.parts[:0])
	defer clear(c.parts)
	for _, b := range c.parts {
		if at >= int64(len(b)) {
			at -= int64(len(b))
			continue
		}
		b = b[at:min(at+n, int64(len(b)))]
		if _, err := io.ReadFull(c.in, b); err != nil {
			return err
		}
		if at, n = 0, n-int64(len(b)); n == 0 {
			break
		}
	}
	return nil
}
