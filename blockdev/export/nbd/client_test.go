package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/qmp/chardev/sockets"
)

// patience bounds each wait of the tests; nothing comes near it unless it hangs.
const patience = 20 * time.Second

// server starts a server with one writable export "x" over d.
func server(t testing.TB, d *fileDevice, o Options, change ...func(*Spec)) (*Server, *Export, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, _, err := sockets.ListenUnix(sockets.UnixAddr{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, o)
	t.Cleanup(func() { stop(t, s) })
	spec := Spec{Name: "x", Size: d.size, Device: d, AllocationDepth: true}
	for _, f := range change {
		f(&spec)
	}
	e, err := s.Add(spec)
	if err != nil {
		t.Fatal(err)
	}
	return s, e, path
}

func stop(t testing.TB, s *Server) {
	t.Helper()
	s.Close()
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("the server does not end")
	}
}

// client is an NBD client that does one thing after the other.
type client struct {
	t    testing.TB
	nc   net.Conn
	r    *bufio.Reader
	form nbdwire.Form
	size uint64
	flag uint16
}

func dial(t testing.TB, path string) *client {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	return &client{t: t, nc: nc, r: bufio.NewReaderSize(nc, 64<<10)}
}

func (c *client) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

func (c *client) put(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) eof() {
	c.t.Helper()
	if b, err := c.r.ReadByte(); err == nil {
		c.t.Errorf("got byte %#x instead of the end", b)
	}
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	if b := c.take(nbdwire.GreetingSize); !bytes.HasPrefix(b, []byte("NBDMAGICIHAVEOPT")) {
		c.t.Fatalf("greeting %q", b)
	}
	c.put([]byte{byte(flags >> 24), byte(flags >> 16), byte(flags >> 8), byte(flags)})
}

type optReply struct {
	nbdwire.OptReply
	data []byte
}

// option sends one and collects its replies up to the acknowledgement or error.
func (c *client) option(opt uint32, data []byte) []optReply {
	c.t.Helper()
	c.put(nbdwire.AppendOption(nil, opt, data))
	var rs []optReply
	for {
		r, err := nbdwire.ParseOptReply(c.take(nbdwire.OptReplySize))
		if err != nil {
			c.t.Fatal(err)
		}
		rs = append(rs, optReply{r, c.take(int(r.Len))})
		if r.Type == nbdwire.RepAck || r.Type >= nbdwire.ErrBit {
			return rs
		}
	}
}

// open negotiates the export "x".
func open(t testing.TB, path string, form nbdwire.Form, contexts ...string) *client {
	t.Helper()
	c := dial(t, path)
	c.greet(3)
	return c.choose(form, contexts...)
}

// choose goes on with the export "x".
func (c *client) choose(form nbdwire.Form, contexts ...string) *client {
	t := c.t
	t.Helper()
	if c.form = form; form != nbdwire.Simple {
		opt := map[nbdwire.Form]uint32{
			nbdwire.Structured: nbdwire.OptStructuredReply, nbdwire.Extended: nbdwire.OptExtendedHeaders,
		}[form]
		if r := c.option(opt, nil); r[0].Type != nbdwire.RepAck {
			t.Fatal(r)
		}
	}
	if len(contexts) > 0 {
		c.option(nbdwire.OptSetMetaContext, nbdwire.AppendMetaQueries(nil, "x", contexts...))
	}
	q := nbdwire.InfoRequest{Name: "x", Infos: []uint16{nbdwire.InfoBlockSize}}
	rs := c.option(nbdwire.OptGo, q.Append(nil))
	if rs[len(rs)-1].Type != nbdwire.RepAck {
		t.Fatalf("GO: %#x %s", rs[len(rs)-1].Type, rs[len(rs)-1].data)
	}
	for _, r := range rs[:len(rs)-1] {
		if i, _ := nbdwire.ParseInfo(r.data); i.Type == nbdwire.InfoExport {
			c.size, c.flag = i.Size, i.Flags
		}
	}
	return c
}

// answer is the whole reply to a request.
type answer struct {
	cookie  uint64
	errno   uint32
	msg     string
	errOff  uint64
	data    []byte
	holes   int64 // bytes told as holes
	extents map[uint32][]nbdwire.Extent
}

// reply reads all of the reply to q (chunks of other requests must not be in between).
func (c *client) reply(q nbdwire.Request) answer {
	c.t.Helper()
	a := answer{cookie: q.Cookie}
	if q.Cmd == nbdwire.CmdRead {
		a.data = make([]byte, q.Len)
	}
	for {
		p := c.head()
		if p.Cookie != q.Cookie || p.Extended && p.Off != q.Off {
			c.t.Fatalf("reply %+v to %+v", p, q)
		}
		if !p.Structured {
			a.errno = p.Errno
			if q.Cmd == nbdwire.CmdRead && p.Errno == 0 {
				copy(a.data, c.take(int(q.Len)))
			}
			return a
		}
		c.chunk(&a, &p, q)
		if p.Done() {
			return a
		}
	}
}

// head reads the head of a reply or a chunk.
func (c *client) head() (p nbdwire.Reply) {
	c.t.Helper()
	h := c.take(nbdwire.SimpleSize)
	n, err := nbdwire.ReplySize(h)
	if err == nil {
		h = append(h, c.take(n-nbdwire.SimpleSize)...)
		_, err = p.ParseReply(h)
	}
	if err != nil || p.Extended != (c.form == nbdwire.Extended) || c.form == nbdwire.Simple && p.Structured {
		c.t.Fatalf("reply %x: %v", h, err)
	}
	return p
}

func (c *client) chunk(a *answer, p *nbdwire.Reply, q nbdwire.Request) {
	c.t.Helper()
	b := c.take(int(p.Len))
	switch p.Type {
	case nbdwire.ChunkNone:
	case nbdwire.ChunkOffsetData:
		off := binary.BigEndian.Uint64(b)
		if len(b) < 9 || off < q.Off || off-q.Off+uint64(len(b)-8) > uint64(q.Len) {
			c.t.Fatalf("data chunk at %d, %d bytes", off, len(b))
		}
		copy(a.data[off-q.Off:], b[8:])
	case nbdwire.ChunkOffsetHole:
		off, n, err := nbdwire.ParseHole(b)
		if err != nil || off < q.Off || off-q.Off+uint64(n) > uint64(q.Len) {
			c.t.Fatalf("hole at %d, %d bytes: %v", off, n, err)
		}
		a.holes += int64(n)
	case nbdwire.ChunkBlockStatus, nbdwire.ChunkBlockStatusExt:
		id, es, err := nbdwire.ParseBlockStatus(p.Type, b, nil)
		if err != nil || p.Extended != (p.Type == nbdwire.ChunkBlockStatusExt) {
			c.t.Fatal(err)
		}
		if a.extents == nil {
			a.extents = map[uint32][]nbdwire.Extent{}
		}
		a.extents[id] = es
	default:
		var err error
		if a.errno, a.msg, a.errOff, err = nbdwire.ParseError(p.Type, b); err != nil || p.Type&nbdwire.ChunkErrBit == 0 {
			c.t.Fatalf("chunk of type %d: %v", p.Type, err)
		}
	}
}

// do sends q, with a payload if it has one, and reads the reply.
func (c *client) do(q nbdwire.Request, payload ...byte) answer {
	c.t.Helper()
	q.Cookie += 0x1122334455667700
	c.send(q, payload)
	return c.reply(q)
}

// send sends q. With extended headers a payload is told of.
func (c *client) send(q nbdwire.Request, payload []byte) {
	c.t.Helper()
	if c.form != nbdwire.Extended {
		c.put(append(q.Append(nil), payload...))
		return
	}
	if q.Cmd == nbdwire.CmdWrite || payload != nil {
		q.Flags |= nbdwire.CmdFlagPayload
	}
	c.put(append(q.AppendExt(nil), payload...))
}

func rd(off uint64, n uint32, flags ...uint16) nbdwire.Request {
	return req(nbdwire.CmdRead, off, n, flags)
}
func wr(off uint64, n uint32, flags ...uint16) nbdwire.Request {
	return req(nbdwire.CmdWrite, off, n, flags)
}

func req(cmd uint16, off uint64, n uint32, flags []uint16) nbdwire.Request {
	q := nbdwire.Request{Cmd: cmd, Off: off, Len: uint64(n)}
	for _, f := range flags {
		q.Flags |= f
	}
	return q
}

// eventually waits until f is true.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

var noDeadline time.Time
