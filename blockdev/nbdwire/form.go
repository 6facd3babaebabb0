package nbdwire

// Form is how replies look, by what the handshake has agreed on. Its methods append replies to a
// request, of which cookie and offset count.
type Form uint8

const (
	// Simple replies have no structure: an error number, then the data of a read.
	Simple Form = iota
	// Structured replies to reads and block status, and all errors, come in chunks.
	Structured
	// Extended headers are those of 64-bit requests, and of replies which are all in chunks.
	Extended
)

// RequestSize is the size of a request without its payload, in bytes.
func (f Form) RequestSize() int {
	if f == Extended {
		return ExtRequestSize
	}
	return RequestSize
}

// ParseRequest decodes a request of RequestSize bytes.
func (f Form) ParseRequest(b []byte, q *Request) error {
	if f == Extended {
		return q.ParseExt(b)
	}
	return q.Parse(b)
}

// ReadHeadSize is the size of what precedes the data of a read in one piece, in bytes.
func (f Form) ReadHeadSize() int { return [...]int{SimpleSize, DataHeadSize, ExtChunkSize + 8}[f] }

// ExtentSize is the size of an extent of a block status, in bytes.
func (f Form) ExtentSize() int {
	if f == Extended {
		return Extent64Size
	}
	return ExtentSize
}

// MaxReplyHead is the size of the longest chunk without data and text, in bytes.
const MaxReplyHead = ExtChunkSize + 14

// AppendSimple appends a simple reply; errno is one of Errno's values, 0 for success. The
// data of a read follow it.
func AppendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = be.AppendUint32(b, MagicSimple)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, cookie)
}

// AppendChunk appends the head of a chunk with n bytes of payload. f is not Simple.
func (f Form) AppendChunk(b []byte, flags, typ uint16, q *Request, n int) []byte {
	magic := MagicStructured
	if f == Extended {
		magic = MagicExtReply
	}
	b = be.AppendUint32(b, magic)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, q.Cookie)
	if f == Extended {
		b = be.AppendUint64(b, q.Off)
		return be.AppendUint64(b, uint64(n))
	}
	return be.AppendUint32(b, uint32(n))
}

// AppendSuccess appends the reply to what has succeeded and is no read with data.
func (f Form) AppendSuccess(b []byte, q *Request) []byte {
	if f == Extended || f == Structured && q.Cmd == CmdRead {
		return f.AppendChunk(b, ChunkDone, ChunkNone, q, 0)
	}
	return AppendSimple(b, q.Cookie, 0)
}

// AppendDataHead appends what comes before n bytes of data at off. f is not Simple.
func (f Form) AppendDataHead(b []byte, flags uint16, q *Request, off uint64, n int) []byte {
	b = f.AppendChunk(b, flags, ChunkOffsetData, q, 8+n)
	return be.AppendUint64(b, off)
}

// AppendHole appends a chunk that tells n zero bytes at off. f is not Simple.
func (f Form) AppendHole(b []byte, flags uint16, q *Request, off uint64, n uint32) []byte {
	b = f.AppendChunk(b, flags, ChunkOffsetHole, q, 12)
	b = be.AppendUint64(b, off)
	return be.AppendUint32(b, n)
}

// AppendError appends a final error; msg is cut to what the protocol allows, and not told in a
// simple reply.
func (f Form) AppendError(b []byte, q *Request, errno uint32, msg string) []byte {
	if f == Simple {
		return AppendSimple(b, q.Cookie, errno)
	}
	msg = msg[:min(len(msg), maxErrorMessage)]
	b = f.AppendChunk(b, ChunkDone, ChunkError, q, 6+len(msg))
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(msg)))
	return append(b, msg...)
}

// AppendErrorOffset appends a final error that concerns the data at off. f is not Simple.
func (f Form) AppendErrorOffset(b []byte, q *Request, errno uint32, off uint64, msg string) []byte {
	msg = msg[:min(len(msg), maxErrorMessage)]
	b = f.AppendChunk(b, ChunkDone, ChunkErrorOffset, q, 14+len(msg))
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(msg)))
	b = append(b, msg...)
	return be.AppendUint64(b, off)
}

// AppendBlockStatus appends a chunk with the extents of one context; they are shorter than 4 GiB
// unless f is Extended. f is not Simple.
func (f Form) AppendBlockStatus(b []byte, flags uint16, q *Request, context uint32, es []Extent) []byte {
	if f != Extended {
		b = f.AppendChunk(b, flags, ChunkBlockStatus, q, 4+len(es)*ExtentSize)
		b = be.AppendUint32(b, context)
		for _, e := range es {
			b = be.AppendUint32(b, uint32(e.N))
			b = be.AppendUint32(b, uint32(e.Flags))
		}
		return b
	}
	b = f.AppendChunk(b, flags, ChunkBlockStatusExt, q, 8+len(es)*Extent64Size)
	b = be.AppendUint32(b, context)
	b = be.AppendUint32(b, uint32(len(es)))
	for _, e := range es {
		b = be.AppendUint64(b, e.N)
		b = be.AppendUint64(b, e.Flags)
	}
	return b
}
