package nbd

import (
	"bytes"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/events/clock"
)

// reply is an option's reply on the wire.
func reply(opt, typ uint32, data ...byte) string {
	return string(nbdwire.AppendOptReply(nil, opt, typ, data))
}

func item(i nbdwire.Info) string { return string(i.AppendReply(nil, nbdwire.OptGo)) }

// dialogue is what a server says first, and what QEMU 7.2 says of it.
type dialogue struct{ server, want string }

func dialogues() []dialogue {
	const opt, unsup = nbdwire.OptGo, nbdwire.RepErrUnsup
	hi := string(nbdwire.AppendGreeting(nil, nbdwire.FixedNewstyle|nbdwire.NoZeroes))
	old := hi + reply(nbdwire.OptExtendedHeaders, unsup)
	extended := hi + reply(nbdwire.OptExtendedHeaders, nbdwire.RepAck)
	plain := old + reply(nbdwire.OptStructuredReply, unsup)
	structured := old + reply(nbdwire.OptStructuredReply, nbdwire.RepAck)
	context := string(nbdwire.AppendMetaContext(nil, nbdwire.OptSetMetaContext, 7, nbdwire.ContextAllocation))
	ack := reply(opt, nbdwire.RepAck)
	size := item(nbdwire.Info{Type: nbdwire.InfoExport, Size: 1 << 20, Flags: 0x6d})
	blocks := func(a, b, c uint32) string {
		return item(nbdwire.Info{Type: nbdwire.InfoBlockSize, Min: a, Preferred: b, Max: c})
	}
	const eof = ": Unexpected end-of-file before all data were read"
	return []dialogue{
		{"", "Failed to read initial magic" + eof},
		{"XXXXXXXX", "Bad initial magic received: 0x5858585858585858"},
		{"NBDMAGIC", "Failed to read server magic" + eof},
		{"NBDMAGICYYYYYYYY", "Bad server magic received: 0x5959595959595959"},
		{"NBDMAGICIHAVEOPT", "Failed to read server flags" + eof},
		{"NBDMAGICIHAVEOPT\x00\x00", "Failed to read export length" + eof},
		{hi, "Failed to read option reply" + eof},
		{hi + strings.Repeat("z", 20), "Unexpected option reply magic"},
		{hi + ack, "Unexpected option type 7 (go), expected 11 (extended headers)"},
		{hi + reply(11, nbdwire.RepAck, 'x'), "Option 11 ('extended headers') response length is 1 (it should be zero)"},
		{old + ack, "Unexpected option type 7 (go), expected 8 (structured reply)"},
		{old + reply(8, nbdwire.RepAck, 'x'), "Option 8 ('structured reply') response length is 1 (it should be zero)"},
		{old + reply(8, nbdwire.RepInfo, 'x'), "Server answered option 8 (structured reply) with unexpected reply 3 (info)"},
		{old + reply(8, nbdwire.RepErrPolicy, 'x') + reply(opt, nbdwire.RepErrPolicy), "Denied by server for option 7 (go)"},
		{plain + reply(opt, nbdwire.RepErrTLSReqd, 'x'), "TLS negotiation required before option 7 (go)"},
		{plain + reply(opt, nbdwire.RepErrInvalid), "Invalid parameters for option 7 (go)"},
		{plain + reply(opt, nbdwire.RepErrPlatform), "Server lacks support for option 7 (go)"},
		{plain + reply(opt, nbdwire.RepErrUnknown), "Requested export not available"},
		{plain + reply(opt, nbdwire.RepErrUnknown, make([]byte, 5000)...), "Requested export not available"},
		{plain + string(nbdwire.AppendOptReplyHead(nil, opt, nbdwire.RepErrUnknown, 1<<31)), "server error 2147483654 (export unknown) message is too long"},
		{plain + reply(opt, nbdwire.RepErrShutdown), "Server shutting down before option 7 (go)"},
		{plain + reply(opt, nbdwire.RepErrBlockSizeReqd), "Server requires INFO_BLOCK_SIZE for option 7 (go)"},
		{plain + reply(opt, nbdwire.ErrBit|99), "Unknown error code when asking for option 7 (go)"},
		{plain + ack, "broken server omitted NBD_INFO_EXPORT"},
		{plain + reply(opt, nbdwire.RepAck, 1, 2), "server sent invalid NBD_REP_ACK"},
		{plain + reply(opt, nbdwire.RepServer), "unexpected reply type 2 (server), expected 3 (info)"},
		{plain + reply(opt, nbdwire.RepInfo, 0), "NBD_REP_INFO length 1 is too short"},
		{plain + reply(opt, nbdwire.RepInfo, make([]byte, 13)...), "remaining export info len 11 is unexpected size"},
		{plain + size[:len(size)-3], "Failed to read info size" + eof},
		{plain + size[:len(size)-12], "Failed to read info type" + eof},
		{plain + blocks(3, 512, 512), "server minimum block size 3 is not a power of two"},
		{plain + blocks(1<<30, 1<<30, 1<<30), "server minimum block size 1073741824 is too large"}, // QEMU takes it
		{plain + blocks(512, 256, 512), "server preferred block size 256 is not valid"},
		{plain + blocks(512, 512, 256), "server maximum block size 256 is not valid"},
		{plain + blocks(4096, 4096, 4096) + item(nbdwire.Info{Size: 1000}), "export size 1000 is not multiple of minimum block size 4096"},
		{structured + reply(10, 4, 1, 2, 3), "Failed to negotiate meta context, server answered with unexpected length 3"},
		{structured + string(nbdwire.AppendMetaContext(nil, 10, 7, "foo")), "Failed to negotiate meta context 'base:allocation', server answered with different context 'foo'"},
		{structured + context + context, "Server answered with more than one context"},
		{structured + reply(10, nbdwire.RepInfo), "Unexpected reply type 3 (info), expected 4 (meta context)"},
		{structured + reply(10, nbdwire.RepAck, 1), "Unexpected length to ACK response"},
		{plain + item(nbdwire.Info{Size: 1<<63 - 1}) + ack, "Could not refresh total sector count: File too large"},
		{plain + item(nbdwire.Info{Size: 1<<63 + 512}) + ack, "Could not refresh total sector count: File too large"}, // QEMU: 0
		{plain + size + ack, ""},
		{plain + reply(opt, nbdwire.RepInfo, 0, 99, 1) + blocks(512, 4096, 1<<20) + size + ack, ""},
		{structured + context + reply(10, nbdwire.RepAck) + size + ack, ""},
		{structured + reply(10, nbdwire.RepErrUnknown, 'x') + size + ack, ""},
		{extended + context + reply(10, nbdwire.RepAck) + size + ack, ""}, // structured replies are not asked for
		{hi + reply(11, nbdwire.RepErrPolicy, 'x') + reply(8, nbdwire.RepAck) + reply(10, nbdwire.RepAck) + size + ack, ""},
		{plain + reply(opt, unsup) + string(put64(1<<20)) + "\x00\x6d", ""},
	}
}

// shake is a handshake in the clear.
func shake(nc net.Conn, name, context string) (*export, error) {
	_, e, err := handshake(nc, &server{export: name, context: context})
	return e, err
}

// TestNoTLS: a server that does not do TLS is not used without.
func TestNoTLS(t *testing.T) {
	hi := string(nbdwire.AppendGreeting(nil, nbdwire.FixedNewstyle|nbdwire.NoZeroes))
	const opt = nbdwire.OptStartTLS
	for _, c := range []dialogue{
		{"NBDMAGIC" + string(put64(nbdwire.MagicOldStyle)) + string(make([]byte, 152)), "Server does not support STARTTLS"},
		{"NBDMAGICIHAVEOPT\x00\x00", "Server does not support STARTTLS"},
		{hi + reply(opt, nbdwire.RepErrPolicy, 'x'), "Denied by server for option 5 (starttls)"},
		{hi + reply(opt, nbdwire.RepErrUnsup), "Server don't support STARTTLS option"},
		{hi + reply(opt, nbdwire.RepAck, 'x'), "Option 5 ('starttls') response length is 1 (it should be zero)"},
	} {
		nc := script(t, c.server)
		_, _, err := handshake(nc, &server{tls: &tlscreds.Client{}})
		if err == nil || err.Error() != c.want {
			t.Errorf("%q:\n%v, want\n%s", c.server, err, c.want)
		}
	}
}

func TestHandshake(t *testing.T) {
	for _, c := range dialogues() {
		e, err := shake(script(t, c.server), "x", nbdwire.ContextAllocation)
		switch {
		case c.want != "" && (err == nil || err.Error() != c.want):
			t.Errorf("%q:\n%v, want\n%s", c.server, err, c.want)
		case c.want == "" && (err != nil || e.size != 1<<20 || e.flags != 0x6d):
			t.Errorf("%q: %+v, %v", c.server, e, err)
		}
	}
}

func TestOldStyle(t *testing.T) {
	old := "NBDMAGIC" + string(put64(nbdwire.MagicOldStyle)) + string(put64(4096)) +
		"\x00\x00\x00\x01" + string(make([]byte, 124))
	if e, err := shake(script(t, old), "", ""); err != nil || e.size != 4096 || e.flags != 1 {
		t.Errorf("old style: %+v, %v", e, err)
	}
	if _, err := shake(script(t, old), "x", ""); err == nil || err.Error() != "Server does not support non-empty export names" {
		t.Errorf("old style: %v", err)
	}
}

// What a server has to say of its refusal is advice.
func TestHint(t *testing.T) {
	hi := string(nbdwire.AppendGreeting(nil, nbdwire.FixedNewstyle|nbdwire.NoZeroes))
	var hint interface{ Hint() string }
	hi += reply(11, nbdwire.RepErrUnsup) + reply(8, nbdwire.RepErrUnsup)
	answers := hi + reply(nbdwire.OptGo, nbdwire.RepErrPolicy, 'n', 'o', 0xff)
	_, err := shake(script(t, answers), "", "")
	if !errors.As(err, &hint) || hint.Hint() != "server reported: no?" {
		t.Errorf("no hint in %v", err)
	}
	answers = hi + reply(nbdwire.OptGo, nbdwire.RepErrTLSReqd, 'n', 'o')
	_, err = shake(script(t, answers), "", "")
	if !errors.As(err, &hint) || hint.Hint() != "Did you forget a valid tls-creds?\nserver reported: no" {
		t.Errorf("no hint in %v", err)
	}
}

// script is a server that says that, whatever it is told.
func script(t testing.TB, says string) *scripted {
	return &scripted{Reader: strings.NewReader(says)}
}

// A server that says nothing is not waited for.
func TestSilentHandshake(t *testing.T) {
	nc, _ := pair(t)
	_ = nc.SetDeadline(time.Now().Add(10 * time.Millisecond))
	_, err := shake(nc, "", "")
	if err == nil || err.Error() != "Failed to read initial magic: Unable to read from socket: Connection timed out" {
		t.Error(err)
	}
}

// FuzzHandshake: no server makes the client panic, or take much memory.
func FuzzHandshake(f *testing.F) {
	f.Add([]byte("NBDMAGICIHAVEOPT\x00\x03" + reply(11, 1) + item(nbdwire.Info{Size: 512}) + reply(7, 1)))
	f.Add([]byte("NBDMAGICIHAVEOPT\x00\x03" + reply(11, nbdwire.RepErrUnsup) + reply(8, 1) +
		string(nbdwire.AppendMetaContext(nil, 10, 7, nbdwire.ContextAllocation)) +
		reply(10, 1) + item(nbdwire.Info{Size: 512}) + reply(7, 1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := shake(script(t, string(b)), "x", nbdwire.ContextAllocation)
		if err == nil {
			l := e.limits()
			if e.size < 0 || l.RequestAlign > maxMinBlock ||
				l.MaxTransfer < l.RequestAlign || l.MaxTransfer > nbdwire.MaxPayload {
				t.Errorf("%+v: %+v", e, l)
			}
		}
	})
}

// FuzzReplies: whatever a server answers, requests end, and what they fill was sent.
func FuzzReplies(f *testing.F) {
	q := nbdwire.Request{Cmd: nbdwire.CmdRead, Cookie: maxInFlight, Off: 4096, Len: 64}
	f.Add(data(q, 0))
	f.Add(append(nbdwire.Structured.AppendDataHead(nil, 0, &q, 4128, 32), make([]byte, 32)...))
	f.Add(slices.Concat(piece(q, 32, 32, 1), piece(q, 0, 32, 2), done(q)))
	f.Add(slices.Concat(piece(q, 32, 32, 1), piece(q, 16, 32, 2), done(q)))
	f.Add(nbdwire.Structured.AppendError(nil, &q, nbdwire.EIO, "text"))
	status := nbdwire.Request{Cookie: q.Cookie + 1, Off: q.Off}
	f.Add(nbdwire.Structured.AppendBlockStatus(nil, 1, &status, 7, []nbdwire.Extent{{N: 3, Flags: 1}}))
	f.Add(extData(q, 1))
	f.Add(nbdwire.Extended.AppendBlockStatus(nil, 1, &status, 7, []nbdwire.Extent{{N: 1 << 40, Flags: 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		fuzzReplies(t, b, false)
		fuzzReplies(t, b, true)
	})
}

func fuzzReplies(t *testing.T, b []byte, extended bool) {
	e := all
	e.extended = extended
	c := newConn(script(t, string(bytes.ReplaceAll(b, []byte{0xEE}, nil))), &e, clock.Real)
	buf := bytes.Repeat([]byte{0xEE}, 64)
	for i := range 2 {
		s := &c.slots[i]
		q := nbdwire.Request{Cmd: nbdwire.CmdRead, Cookie: maxInFlight + uint64(i), Off: 4096, Len: 64}
		if i == 1 {
			q.Cmd = nbdwire.CmdBlockStatus
		}
		s.req, s.busy, s.sent = q, true, true
		c.busy++ // +checklocksignore: nobody else has it yet
	}
	c.slots[0].setBuffer(buf)
	c.run(func(error) {})
	for i := range 2 {
		if len(c.slots[i].done) != 1 {
			t.Errorf("request %d: %d ends", i, len(c.slots[i].done))
		}
	}
	if s := &c.slots[0]; !s.lost && s.err == nil && bytes.IndexByte(buf, 0xEE) >= 0 {
		t.Errorf("the buffer is %x", buf)
	}
}
