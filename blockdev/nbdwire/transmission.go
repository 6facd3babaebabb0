package nbdwire

import (
	"errors"
	"syscall"

	"qblockd/graph/blk"
)

// Request is one command of the transmission phase. Off and Len are bytes.
type Request struct {
	Flags, Cmd uint16
	Cookie     uint64
	Off        uint64
	Len        uint64 // less than 4 GiB unless headers are extended
}

// Append appends the RequestSize bytes of q; a write's payload follows them.
func (q *Request) Append(b []byte) []byte {
	b = be.AppendUint32(b, MagicRequest)
	b = be.AppendUint16(b, q.Flags)
	b = be.AppendUint16(b, q.Cmd)
	b = be.AppendUint64(b, q.Cookie)
	b = be.AppendUint64(b, q.Off)
	return be.AppendUint32(b, uint32(q.Len))
}

// AppendExt appends the ExtRequestSize bytes of q with an extended header.
func (q *Request) AppendExt(b []byte) []byte {
	b = be.AppendUint32(b, MagicExtRequest)
	b = be.AppendUint16(b, q.Flags)
	b = be.AppendUint16(b, q.Cmd)
	b = be.AppendUint64(b, q.Cookie)
	b = be.AppendUint64(b, q.Off)
	return be.AppendUint64(b, q.Len)
}

// Parse decodes RequestSize bytes into q. With ErrMagic q is set all the same, for the error reply.
func (q *Request) Parse(b []byte) error {
	if len(b) < RequestSize {
		return ErrShort
	}
	q.Flags = be.Uint16(b[4:])
	q.Cmd = be.Uint16(b[6:])
	q.Cookie = be.Uint64(b[8:])
	q.Off = be.Uint64(b[16:])
	q.Len = uint64(be.Uint32(b[24:]))
	if be.Uint32(b) != MagicRequest {
		return ErrMagic
	}
	return nil
}

// ParseExt decodes ExtRequestSize bytes into q, as Parse does those of a compact header.
func (q *Request) ParseExt(b []byte) error {
	if len(b) < ExtRequestSize {
		return ErrShort
	}
	_ = q.Parse(b) // all but the magic number and the length are the same
	q.Len = be.Uint64(b[24:])
	if be.Uint32(b) != MagicExtRequest {
		return ErrMagic
	}
	return nil
}

// Reply is the head of a reply of any kind.
type Reply struct {
	Structured  bool   // it is a chunk
	Extended    bool   // and has an extended header
	Flags, Type uint16 // structured
	Errno       uint32 // simple
	Cookie      uint64
	Off         uint64 // extended: of the request
	Len         uint64 // structured: bytes of payload
}

// Done tells whether the request is answered with this reply (and what belongs to it).
func (p *Reply) Done() bool { return !p.Structured || p.Flags&ChunkDone != 0 }

// ParseReply decodes the head of a reply and returns its size; 0 means that b is
// too short. ReplySize tells how long it has to be.
func (p *Reply) ParseReply(b []byte) (size int, err error) {
	if len(b) < SimpleSize {
		return 0, nil
	}
	*p = Reply{Cookie: be.Uint64(b[8:])}
	switch be.Uint32(b) {
	case MagicSimple:
		p.Errno = be.Uint32(b[4:])
		return SimpleSize, nil
	case MagicStructured:
		if len(b) < ChunkSize {
			return 0, nil
		}
		p.Structured = true
		p.Flags, p.Type = be.Uint16(b[4:]), be.Uint16(b[6:])
		p.Len = uint64(be.Uint32(b[16:]))
		return ChunkSize, nil
	case MagicExtReply:
		if len(b) < ExtChunkSize {
			return 0, nil
		}
		p.Structured, p.Extended = true, true
		p.Flags, p.Type = be.Uint16(b[4:]), be.Uint16(b[6:])
		p.Off, p.Len = be.Uint64(b[16:]), be.Uint64(b[24:])
		return ExtChunkSize, nil
	}
	return 0, ErrMagic
}

// ReplySize is the size of the head of a reply of which b is the beginning, at least SimpleSize
// bytes.
func ReplySize(b []byte) (int, error) {
	if len(b) < SimpleSize {
		return 0, ErrShort
	}
	switch be.Uint32(b) {
	case MagicSimple:
		return SimpleSize, nil
	case MagicStructured:
		return ChunkSize, nil
	case MagicExtReply:
		return ExtChunkSize, nil
	}
	return 0, ErrMagic
}

// ParseHole decodes the payload of a ChunkOffsetHole.
func ParseHole(payload []byte) (off uint64, n uint32, err error) {
	if len(payload) != 12 {
		return 0, 0, ErrLengths
	}
	return be.Uint64(payload), be.Uint32(payload[8:]), nil
}

// ParseError decodes the payload of an error chunk; off is 0 unless typ is ChunkErrorOffset.
func ParseError(typ uint16, payload []byte) (errno uint32, msg string, off uint64, err error) {
	if len(payload) < 6 {
		return 0, "", 0, ErrShort
	}
	errno = be.Uint32(payload)
	n := int(be.Uint16(payload[4:]))
	if n > len(payload)-6 {
		return errno, "", 0, ErrLengths
	}
	msg = string(payload[6 : 6+n])
	if typ == ChunkErrorOffset {
		if len(payload) < 14+n {
			return errno, msg, 0, ErrShort
		}
		off = be.Uint64(payload[6+n:])
	}
	return errno, msg, off, nil
}

// Extent is a run of N bytes with equal flags in one metadata context.
type Extent struct{ N, Flags uint64 }

// ParseBlockStatus decodes the payload of a chunk of type typ, which is ChunkBlockStatus or
// ChunkBlockStatusExt, appending to es.
func ParseBlockStatus(typ uint16, payload []byte, es []Extent) (context uint32, _ []Extent, err error) {
	head, size := 4, ExtentSize
	if typ == ChunkBlockStatusExt {
		head, size = 8, Extent64Size
	}
	if len(payload) < head+size || (len(payload)-head)%size != 0 {
		return 0, es, ErrLengths
	}
	if head == 8 && uint64(be.Uint32(payload[4:])) != uint64((len(payload)-head)/size) {
		return 0, es, ErrLengths
	}
	context = be.Uint32(payload)
	for p := payload[head:]; len(p) > 0; p = p[size:] {
		x := Extent{uint64(be.Uint32(p)), uint64(be.Uint32(p[4:]))}
		if typ == ChunkBlockStatusExt {
			x = Extent{be.Uint64(p), be.Uint64(p[8:])}
		}
		es = append(es, x)
	}
	return context, es, nil
}

// AppendStatusPayload appends the payload of a CmdBlockStatus with CmdFlagPayload: it asks about n
// bytes in the contexts with these ids only.
func AppendStatusPayload(b []byte, n uint64, ids ...uint32) []byte {
	b = be.AppendUint64(b, n)
	for _, id := range ids {
		b = be.AppendUint32(b, id)
	}
	return b
}

// StatusPayloadSize is the size of the payload that names so many contexts, in bytes.
func StatusPayloadSize(ids int) int { return 8 + 4*ids }

// ParseStatusPayload decodes the payload of a CmdBlockStatus, appending to ids.
func ParseStatusPayload(payload []byte, ids []uint32) (n uint64, _ []uint32, err error) {
	if len(payload) < 8 || len(payload)%4 != 0 {
		return 0, ids, ErrLengths
	}
	for p := payload[8:]; len(p) > 0; p = p[4:] {
		ids = append(ids, be.Uint32(p))
	}
	return be.Uint64(payload), ids, nil
}

// Error numbers of the wire; they are those of Linux.
const (
	EPERM     uint32 = 1
	EIO       uint32 = 5
	ENOMEM    uint32 = 12
	EINVAL    uint32 = 22
	ENOSPC    uint32 = 28
	EOVERFLOW uint32 = 75
	ENOTSUP   uint32 = 95
	ESHUTDOWN uint32 = 108
)

var errnos = map[syscall.Errno]uint32{
	0: 0, syscall.EPERM: EPERM, syscall.EROFS: EPERM, syscall.EIO: EIO, syscall.ENOMEM: ENOMEM,
	syscall.EDQUOT: ENOSPC, syscall.EFBIG: ENOSPC, syscall.ENOSPC: ENOSPC,
	syscall.EOVERFLOW: EOVERFLOW, syscall.ENOTSUP: ENOTSUP, syscall.ESHUTDOWN: ESHUTDOWN,
}

// Errno is the error number that tells err to a client; 0 for nil. It follows blk.Errno;
// numbers the protocol does not have become EINVAL.
func Errno(err error) uint32 {
	if no, ok := errnos[blk.Errno(err)]; ok {
		return no
	}
	if errors.Is(err, blk.ErrClosed) {
		return ESHUTDOWN
	}
	return EINVAL
}

// FromErrno is the host's error for a number of the wire; nil for 0, EINVAL for unknown ones.
func FromErrno(no uint32) error {
	switch no {
	case 0:
		return nil
	case EPERM, EIO, ENOMEM, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN:
		return syscall.Errno(no)
	}
	return syscall.EINVAL
}
