package nbdwire

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"qblockd/graph/blk"
)

func TestHandshakeRoundTrips(t *testing.T) {
	if b := AppendGreeting(nil, FixedNewstyle|NoZeroes); string(b) != "NBDMAGICIHAVEOPT\x00\x03" {
		t.Errorf("greeting: %q", b)
	}
	o, err := ParseOption(AppendOption(nil, OptGo, []byte("abc")))
	if o != (Option{OptGo, 3}) || err != nil {
		t.Errorf("option: %v %v", o, err)
	}
	r, err := ParseOptReply(AppendOptReply(nil, OptGo, RepErrUnknown, []byte("abcd")))
	if r != (OptReply{OptGo, RepErrUnknown, 4}) || err != nil {
		t.Errorf("option reply: %v %v", r, err)
	}
	q := InfoRequest{Name: "disk", Infos: []uint16{InfoBlockSize, InfoName}}
	if got, err := ParseInfoRequest(q.Append(nil)); !reflect.DeepEqual(got, q) || err != nil {
		t.Errorf("info request: %v %v", got, err)
	}
	for _, i := range []Info{
		{Type: InfoExport, Size: 1 << 40, Flags: 0x5ff},
		{Type: InfoName, Text: "n"},
		{Type: InfoDescription, Text: ""},
		{Type: InfoBlockSize, Min: 1, Preferred: 4096, Max: MaxPayload},
	} {
		b := i.AppendReply(nil, OptInfo)
		if got, err := ParseInfo(b[OptReplySize:]); got != i || err != nil {
			t.Errorf("info: %v, want %v; %v", got, i, err)
		}
	}
	if b := AppendServer(nil, "x", "the x")[OptReplySize:]; string(b) != "\x00\x00\x00\x01xthe x" {
		t.Errorf("server: %q", b)
	}
	id, ctx, err := ParseMetaContext(AppendMetaContext(nil, OptSetMetaContext, 7, ContextDepth)[OptReplySize:])
	if id != 7 || ctx != ContextDepth || err != nil {
		t.Errorf("context: %v %v %v", id, ctx, err)
	}
}

func TestInfoRequestErrors(t *testing.T) {
	for in, want := range map[string]error{
		"":                                 ErrLengths,
		"\x00\x00\x00\x05abcd":             ErrLengths,
		"\x00\x00\x00\x02a\x00\x00\x00":    ErrNUL,
		"\x00\x00\x00\x01a":                ErrLengths,
		"\x00\x00\x00\x01a\x00\x01":        ErrLengths,
		"\x00\x00\x00\x01a\x00\x00\x00":    ErrTrailing,
		"\x00\x00\x10\x01":                 NameLengthError(4097),
		"\xff\xff\xff\xff":                 NameLengthError(1<<32 - 1),
		"\x00\x00\x00\x00\x00\x01\x00\x03": nil,
	} {
		if _, err := ParseInfoRequest([]byte(in)); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", in, err, want)
		}
	}
}

func TestMetaQueries(t *testing.T) {
	long := strings.Repeat("q", MaxString+1)
	q, err := ParseMetaQueries(AppendMetaQueries(nil, "x", "base:", long, ""))
	if err != nil || q.Name != "x" {
		t.Fatal(q.Name, err)
	}
	if n, err := q.Count(); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	for i, want := range []struct {
		s  string
		ok bool
	}{{"base:", true}, {"", false}, {"", true}} {
		if s, ok, err := q.Next(); s != want.s || ok != want.ok || err != nil {
			t.Errorf("%d: %q %v %v", i, s, ok, err)
		}
	}
	if _, _, err := q.Next(); err != ErrLengths {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestTransmissionRoundTrips(t *testing.T) {
	q := Request{CmdFlagFUA, CmdWrite, 0x0102030405060708, 1 << 40, 4096}
	testExtRoundTrips(t, q)
	b := q.Append(nil)
	if len(b) != RequestSize {
		t.Fatal(len(b))
	}
	var got Request
	if err := got.Parse(b); got != q || err != nil {
		t.Errorf("request: %v %v", got, err)
	}
	b[0] ^= 1
	if err := got.Parse(b); err != ErrMagic || got.Cookie != q.Cookie {
		t.Errorf("bad magic: %v %v", got, err)
	}
	var p Reply
	if n, err := p.ParseReply(AppendSimple(nil, 9, ENOSPC)); n != SimpleSize || err != nil || !p.Done() ||
		p != (Reply{Errno: ENOSPC, Cookie: 9}) {
		t.Errorf("simple reply: %v %v %v", n, p, err)
	}
	q = Request{Cookie: 9, Off: 77}
	b = Structured.AppendDataHead(nil, 0, &q, 4096, 2)
	if len(b) != DataHeadSize {
		t.Error(len(b))
	}
	if n, err := p.ParseReply(b); n != ChunkSize || err != nil || p.Done() || p.Len != 10 || p.Type != ChunkOffsetData {
		t.Errorf("data chunk: %v %v %v", n, p, err)
	}
	if off := be.Uint64(b[ChunkSize:]); off != 4096 {
		t.Errorf("data at %d", off)
	}
	if n, err := p.ParseReply(b[:17]); n != 0 || err != nil {
		t.Errorf("incomplete chunk: %v %v", n, err)
	}
	b = Structured.AppendHole(nil, ChunkDone, &q, 5, 6)
	if off, n, err := ParseHole(b[ChunkSize:]); off != 5 || n != 6 || err != nil {
		t.Errorf("hole: %v %v %v", off, n, err)
	}
	no, msg, off, err := ParseError(ChunkErrorOffset, Structured.AppendErrorOffset(nil, &q, EIO, 77, "bad")[ChunkSize:])
	if no != EIO || msg != "bad" || off != 77 || err != nil {
		t.Errorf("error: %v %v %v %v", no, msg, off, err)
	}
	no, msg, _, err = ParseError(ChunkError, Structured.AppendError(nil, &q, EIO, strings.Repeat("x", 9999))[ChunkSize:])
	if no != EIO || len(msg) != maxErrorMessage || err != nil {
		t.Errorf("long error: %v %v %v", no, len(msg), err)
	}
	es := []Extent{{1, 0}, {1 << 31, StateHole | StateZero}}
	b = Structured.AppendBlockStatus(nil, ChunkDone, &q, 3, es)
	id, ges, err := ParseBlockStatus(ChunkBlockStatus, b[ChunkSize:], nil)
	if id != 3 || !reflect.DeepEqual(es, ges) || err != nil {
		t.Errorf("block status: %v %v %v", id, ges, err)
	}
	if _, err := p.ParseReply(bytes.Repeat([]byte{1}, 20)); err != ErrMagic {
		t.Errorf("bad reply: %v", err)
	}
}

func testExtRoundTrips(t *testing.T, q Request) {
	q.Len = 1 << 50
	b := q.AppendExt(nil)
	var got Request
	if err := got.ParseExt(b); len(b) != ExtRequestSize || got != q || err != nil {
		t.Errorf("extended request: %v %v", got, err)
	}
	if err := got.Parse(b); err != ErrMagic {
		t.Errorf("extended request as a compact one: %v", err)
	}
	if err := got.ParseExt(b[:31]); err != ErrShort {
		t.Errorf("short request: %v", err)
	}
	es := []Extent{{1 << 50, 3}, {1, 1 << 40}}
	q.Cookie, q.Off = 9, 77
	b = Extended.AppendBlockStatus(nil, ChunkDone, &q, 3, es)
	var p Reply
	want := Reply{
		Structured: true, Extended: true, Flags: ChunkDone, Type: ChunkBlockStatusExt, Cookie: 9, Off: 77, Len: 40,
	}
	if n, err := p.ParseReply(b); n != ExtChunkSize || err != nil || p != want {
		t.Errorf("extended chunk: %d %+v %v", n, p, err)
	}
	if n, err := ReplySize(b[:SimpleSize]); n != ExtChunkSize || err != nil {
		t.Errorf("size of an extended chunk: %v %v", n, err)
	}
	if n, err := p.ParseReply(b[:31]); n != 0 || err != nil {
		t.Errorf("incomplete chunk: %v %v", n, err)
	}
	id, ges, err := ParseBlockStatus(ChunkBlockStatusExt, b[ExtChunkSize:], nil)
	if id != 3 || !reflect.DeepEqual(es, ges) || err != nil {
		t.Errorf("block status: %v %v %v", id, ges, err)
	}
	b = AppendStatusPayload(nil, 1<<40, 3, 1)
	if n, ids, err := ParseStatusPayload(b, nil); len(b) != StatusPayloadSize(2) || n != 1<<40 ||
		!slices.Equal(ids, []uint32{3, 1}) || err != nil {
		t.Errorf("payload of a block status: %d %v %v", n, ids, err)
	}
	for _, n := range []int{0, 7, 11, 13} {
		if _, _, err := ParseStatusPayload(make([]byte, n), nil); err != ErrLengths {
			t.Errorf("payload of %d bytes: %v", n, err)
		}
	}
}

// What each form has instead of which others; sizes that are reserved are enough.
func TestForms(t *testing.T) {
	read, write := Request{Cmd: CmdRead, Cookie: 9, Off: 77}, Request{Cmd: CmdWrite, Cookie: 9, Off: 77}
	for form, want := range map[Form][2]Reply{
		Simple:     {{Cookie: 9}, {Cookie: 9}},
		Structured: {{Structured: true, Flags: ChunkDone, Cookie: 9}, {Cookie: 9}},
		Extended: {{Structured: true, Extended: true, Flags: ChunkDone, Cookie: 9, Off: 77},
			{Structured: true, Extended: true, Flags: ChunkDone, Cookie: 9, Off: 77}},
	} {
		for i, q := range []*Request{&read, &write} {
			var p Reply
			if _, err := p.ParseReply(form.AppendSuccess(nil, q)); err != nil || p != want[i] {
				t.Errorf("form %d: %+v %v, want %+v", form, p, err, want[i])
			}
		}
		b := read.Append(nil)
		if form == Extended {
			b = read.AppendExt(nil)
		}
		var q Request
		if err := form.ParseRequest(b, &q); err != nil || q != read || len(b) != form.RequestSize() {
			t.Errorf("form %d: %+v, %d bytes, %v", form, q, len(b), err)
		}
		longest := len(form.AppendError(nil, &read, EIO, ""))
		head := SimpleSize
		if form != Simple {
			head = len(form.AppendDataHead(nil, 0, &read, 0, 1))
			hole, fault := form.AppendHole(nil, 0, &read, 0, 1), form.AppendErrorOffset(nil, &read, EIO, 0, "")
			longest = max(longest, head, len(hole), len(fault))
		}
		if head != form.ReadHeadSize() || longest > MaxReplyHead {
			t.Errorf("form %d: %d bytes before data, %d at most", form, head, longest)
		}
	}
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want uint32
	}{
		{nil, 0},
		{syscall.EPERM, EPERM},
		{syscall.EROFS, EPERM},
		{syscall.EFBIG, ENOSPC},
		{syscall.EDQUOT, ENOSPC},
		{fmt.Errorf("x: %w", syscall.ENOSPC), ENOSPC},
		{syscall.EOPNOTSUPP, ENOTSUP},
		{syscall.ENOMEM, ENOMEM},
		{syscall.EOVERFLOW, EOVERFLOW},
		{syscall.ESHUTDOWN, ESHUTDOWN},
		{syscall.EBUSY, EINVAL},
		{blk.ErrReadOnly, EPERM},
		{blk.ErrNotSupported, ENOTSUP},
		{blk.ErrClosed, ESHUTDOWN},
		{blk.ErrCorrupt, EIO},
		{errors.New("x"), EIO},
	} {
		if got := Errno(c.err); got != c.want {
			t.Errorf("Errno(%v) = %d, want %d", c.err, got, c.want)
		}
		if e := FromErrno(c.want); c.want != 0 && Errno(e) != c.want {
			t.Errorf("Errno(FromErrno(%d)) = %d", c.want, Errno(e))
		}
	}
}

// What the hot path uses allocates nothing.
func TestNoAllocations(t *testing.T) {
	b := make([]byte, 0, 256)
	q := Request{Cmd: CmdRead, Len: 4096}
	if n := testing.AllocsPerRun(100, func() {
		b = q.Append(b[:0])
		q.Parse(b)
		b = Extended.AppendDataHead(b, ChunkDone, &q, q.Off, 4096)
		b = AppendSimple(b, q.Cookie, 0)
		var p Reply
		p.ParseReply(b[RequestSize:])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzParse: no input makes a decoder panic, and what one accepts it encodes again.
func FuzzParse(f *testing.F) {
	f.Add(AppendGreeting(nil, 3))
	f.Add(AppendMetaQueries(nil, "x", "base:allocation", ""))
	f.Add((&InfoRequest{Name: "x", Infos: []uint16{3}}).Append(nil))
	q := Request{Cookie: 1, Off: 2}
	f.Add(Structured.AppendErrorOffset(nil, &q, EIO, 2, "m")[ChunkSize:])
	f.Add(AppendStatusPayload(nil, 1<<40, 0, 1))
	f.Add(Extended.AppendBlockStatus(nil, 0, &q, 2, []Extent{{3, 4}})[ExtChunkSize:])
	f.Add(Structured.AppendBlockStatus(nil, 0, &q, 2, []Extent{{3, 4}})[ChunkSize:])
	f.Fuzz(func(t *testing.T, b []byte) {
		ParseOption(b)
		ParseExportNameReply(b)
		ParseOldStyle(b)
		ParseOptReply(b)
		ParseInfo(b)
		ParseMetaContext(b)
		ParseHole(b)
		ParseError(ChunkError, b)
		ParseError(ChunkErrorOffset, b)
		ParseBlockStatus(ChunkBlockStatus, b, nil)
		ParseBlockStatus(ChunkBlockStatusExt, b, nil)
		ReplySize(b)
		var p Reply
		p.ParseReply(b)
		if q, err := ParseInfoRequest(b); err == nil && !bytes.Equal(q.Append(nil), b) {
			t.Errorf("%q is %v", b, q)
		}
		if n, ids, err := ParseStatusPayload(b, nil); err == nil && !bytes.Equal(AppendStatusPayload(nil, n, ids...), b) {
			t.Errorf("%q is %d %v", b, n, ids)
		}
		if q, err := ParseMetaQueries(b); err == nil {
			if n, err := q.Count(); err == nil {
				for range n {
					if _, _, err := q.Next(); err != nil {
						break
					}
				}
			}
		}
		var r Request
		if r.Parse(b) == nil && !bytes.Equal(r.Append(nil), b[:RequestSize]) {
			t.Errorf("%q is %v", b, r)
		}
		if r.ParseExt(b) == nil && !bytes.Equal(r.AppendExt(nil), b[:ExtRequestSize]) {
			t.Errorf("%q is %v", b, r)
		}
	})
}
