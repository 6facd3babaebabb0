package nbdwire

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
)

var be = binary.BigEndian

// Errors of decoders.
var (
	ErrShort = errors.New("NBD message is too short")
	ErrMagic = errors.New("bad NBD magic")
	// ErrLengths: lengths inside an option's data contradict its length.
	ErrLengths = errors.New("inconsistent lengths")
	// ErrNUL: a string has a NUL byte in it.
	ErrNUL = errors.New("unexpected embedded NUL")
	// ErrTrailing: bytes are left behind the last member.
	ErrTrailing = errors.New("unexpected length")
)

// NameLengthError tells that a string is longer than MaxString; the value is its length.
type NameLengthError uint32

func (e NameLengthError) Error() string { return fmt.Sprintf("invalid name length: %d", uint32(e)) }

// AppendGreeting appends the server's first bytes. flags is of FixedNewstyle, NoZeroes.
func AppendGreeting(b []byte, flags uint16) []byte {
	b = be.AppendUint64(b, MagicInit)
	b = be.AppendUint64(b, MagicOption)
	return be.AppendUint16(b, flags)
}

// ParseExportNameReply decodes the first ExportNameReply bytes of the answer to OptExportName.
func ParseExportNameReply(b []byte) (size uint64, flags uint16, err error) {
	if len(b) < ExportNameReply {
		return 0, 0, ErrShort
	}
	return be.Uint64(b), be.Uint16(b[8:]), nil
}

// ParseOldStyle decodes the OldStyleSize bytes in which a server without options describes its
// export.
func ParseOldStyle(b []byte) (size uint64, flags uint32, err error) {
	if len(b) < OldStyleSize {
		return 0, 0, ErrShort
	}
	return be.Uint64(b), be.Uint32(b[8:]), nil
}

// Option is the head of an option; Len bytes of data follow.
type Option struct{ Opt, Len uint32 }

// AppendOption appends an option with its data.
func AppendOption(b []byte, opt uint32, data []byte) []byte {
	b = be.AppendUint64(b, MagicOption)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// ParseOption decodes OptionSize bytes.
func ParseOption(b []byte) (Option, error) {
	if len(b) < OptionSize {
		return Option{}, ErrShort
	}
	if be.Uint64(b) != MagicOption {
		return Option{}, ErrMagic
	}
	return Option{Opt: be.Uint32(b[8:]), Len: be.Uint32(b[12:])}, nil
}

// OptReply is the head of a reply to an option; Len bytes of data follow.
type OptReply struct{ Opt, Type, Len uint32 }

// AppendOptReplyHead appends the head of a reply whose n bytes of data the caller appends.
func AppendOptReplyHead(b []byte, opt, typ uint32, n int) []byte {
	b = be.AppendUint64(b, MagicOptReply)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, typ)
	return be.AppendUint32(b, uint32(n))
}

// AppendOptReply appends a reply with its data.
func AppendOptReply(b []byte, opt, typ uint32, data []byte) []byte {
	return append(AppendOptReplyHead(b, opt, typ, len(data)), data...)
}

// ParseOptReply decodes OptReplySize bytes.
func ParseOptReply(b []byte) (OptReply, error) {
	if len(b) < OptReplySize {
		return OptReply{}, ErrShort
	}
	if be.Uint64(b) != MagicOptReply {
		return OptReply{}, ErrMagic
	}
	return OptReply{Opt: be.Uint32(b[8:]), Type: be.Uint32(b[12:]), Len: be.Uint32(b[16:])}, nil
}

// reader takes members off an option's data. After an error, which stays, there is nothing left.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) { r.b, r.err = nil, cmp.Or(r.err, err) }

// take takes n bytes, nil if there are fewer.
func (r *reader) take(n uint32) (b []byte) {
	if uint64(len(r.b)) < uint64(n) {
		r.fail(ErrLengths)
		return nil
	}
	b, r.b = r.b[:n], r.b[n:]
	return b
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

// text takes n bytes without a NUL.
func (r *reader) text(n uint32) string {
	s := r.take(n)
	if bytes.IndexByte(s, 0) >= 0 {
		r.fail(ErrNUL)
		return ""
	}
	return string(s)
}

// name takes a length and that many bytes, at most MaxString.
func (r *reader) name() string {
	n := r.uint32()
	if n > MaxString {
		r.fail(NameLengthError(n))
	}
	return r.text(n)
}

// InfoRequest is the data of OptInfo and OptGo.
type InfoRequest struct {
	Name  string
	Infos []uint16
}

// Append appends the encoded data.
func (q *InfoRequest) Append(b []byte) []byte {
	b = be.AppendUint32(b, uint32(len(q.Name)))
	b = append(b, q.Name...)
	b = be.AppendUint16(b, uint16(len(q.Infos)))
	for _, i := range q.Infos {
		b = be.AppendUint16(b, i)
	}
	return b
}

// ParseInfoRequest decodes the data of OptInfo or OptGo. Errors: ErrLengths, ErrNUL, ErrTrailing,
// NameLengthError.
func ParseInfoRequest(data []byte) (q InfoRequest, err error) {
	r := reader{b: data}
	q.Name = r.name()
	for n := r.uint16(); n > 0 && r.err == nil; n-- {
		q.Infos = append(q.Infos, r.uint16())
	}
	if len(r.b) > 0 {
		r.fail(ErrTrailing)
	}
	return q, r.err
}

// Info is one item of the answer to OptInfo and OptGo. Which members count depends on Type.
type Info struct {
	Type  uint16
	Size  uint64 // InfoExport: bytes
	Flags uint16 // InfoExport: transmission flags
	Text  string // InfoName, InfoDescription
	// InfoBlockSize, bytes
	Min, Preferred, Max uint32
}

// AppendReply appends i as a whole reply to opt.
func (i *Info) AppendReply(b []byte, opt uint32) []byte {
	switch i.Type {
	case InfoExport:
		b = AppendOptReplyHead(b, opt, RepInfo, 12)
		b = be.AppendUint16(b, i.Type)
		b = be.AppendUint64(b, i.Size)
		return be.AppendUint16(b, i.Flags)
	case InfoBlockSize:
		b = AppendOptReplyHead(b, opt, RepInfo, 14)
		b = be.AppendUint16(b, i.Type)
		b = be.AppendUint32(b, i.Min)
		b = be.AppendUint32(b, i.Preferred)
		return be.AppendUint32(b, i.Max)
	default:
		b = AppendOptReplyHead(b, opt, RepInfo, 2+len(i.Text))
		b = be.AppendUint16(b, i.Type)
		return append(b, i.Text...)
	}
}

// ParseInfo decodes the data of a RepInfo reply. Unknown types come back with Type alone.
func ParseInfo(data []byte) (i Info, err error) {
	if len(data) < 2 {
		return i, ErrShort
	}
	i.Type = be.Uint16(data)
	d := data[2:]
	switch i.Type {
	case InfoExport:
		if len(d) != 10 {
			return i, ErrLengths
		}
		i.Size, i.Flags = be.Uint64(d), be.Uint16(d[8:])
	case InfoBlockSize:
		if len(d) != 12 {
			return i, ErrLengths
		}
		i.Min, i.Preferred, i.Max = be.Uint32(d), be.Uint32(d[4:]), be.Uint32(d[8:])
	case InfoName, InfoDescription:
		if len(d) > MaxString {
			return i, NameLengthError(len(d))
		}
		i.Text = string(d)
	}
	return i, nil
}

// AppendServer appends a RepServer reply to OptList.
func AppendServer(b []byte, name, description string) []byte {
	b = AppendOptReplyHead(b, OptList, RepServer, 4+len(name)+len(description))
	b = be.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	return append(b, description...)
}

// MetaQueries is the data of OptListMetaContext and OptSetMetaContext, read step by step
// because the export's name decides whether the rest matters.
type MetaQueries struct {
	Name string
	r    reader
}

// ParseMetaQueries decodes the export's name.
func ParseMetaQueries(data []byte) (q MetaQueries, err error) {
	q.r.b = data
	q.Name = q.r.name()
	return q, q.r.err
}

// Count decodes the number of queries that follow.
func (q *MetaQueries) Count() (uint32, error) {
	n := q.r.uint32()
	return n, q.r.err
}

// Next decodes one query; ok is false for one longer than MaxString, which matches nothing.
func (q *MetaQueries) Next() (query string, ok bool, err error) {
	n := q.r.uint32()
	if n > MaxString {
		q.r.take(n)
		return "", false, q.r.err
	}
	query = q.r.text(n)
	return query, q.r.err == nil, q.r.err
}

// AppendMetaQueries appends the data of OptListMetaContext or OptSetMetaContext.
func AppendMetaQueries(b []byte, name string, queries ...string) []byte {
	b = be.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	b = be.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = be.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

// AppendMetaContext appends a RepMetaContext reply to opt.
func AppendMetaContext(b []byte, opt, id uint32, name string) []byte {
	b = AppendOptReplyHead(b, opt, RepMetaContext, 4+len(name))
	b = be.AppendUint32(b, id)
	return append(b, name...)
}

// ParseMetaContext decodes the data of a RepMetaContext reply.
func ParseMetaContext(data []byte) (id uint32, name string, err error) {
	if len(data) < 4 {
		return 0, "", ErrShort
	}
	if len(data)-4 > MaxString {
		return 0, "", NameLengthError(len(data) - 4)
	}
	return be.Uint32(data), string(data[4:]), nil
}
