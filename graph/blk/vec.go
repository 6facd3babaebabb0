package blk

// Vec is a sequence of buffers that one request reads into or writes from. It is passed
// by value and holds its first buffer directly: a Vec of one buffer costs no allocation,
// not even through an interface. The request does not own the memory after it returned.
type Vec struct {
	first []byte
	more  [][]byte
}

// Buf is the Vec of one buffer.
func Buf(b []byte) Vec { return Vec{first: b} }

// Bufs is the Vec of several buffers; it keeps bs[1:].
func Bufs(bs [][]byte) Vec {
	if len(bs) == 0 {
		return Vec{}
	}
	return Vec{first: bs[0], more: bs[1:]}
}

// Len is the sum of the buffers' lengths.
func (v Vec) Len() int64 {
	n := int64(len(v.first))
	for _, b := range v.more {
		n += int64(len(b))
	}
	return n
}

// Single returns the one buffer of v, if it has just one.
func (v Vec) Single() ([]byte, bool) { return v.first, len(v.more) == 0 }

// Each calls f for every non-empty buffer in order.
func (v Vec) Each(f func(b []byte)) {
	if len(v.first) > 0 {
		f(v.first)
	}
	for _, b := range v.more {
		if len(b) > 0 {
			f(b)
		}
	}
}

// AppendTo appends the non-empty buffers to dst.
func (v Vec) AppendTo(dst [][]byte) [][]byte {
	if len(v.first) > 0 {
		dst = append(dst, v.first)
	}
	for _, b := range v.more {
		if len(b) > 0 {
			dst = append(dst, b)
		}
	}
	return dst
}

// Slice is the part [off, off+n) of v; it panics when that lies outside. It allocates
// only when the part spans several buffers.
func (v Vec) Slice(off, n int64) Vec {
	if off < 0 || n < 0 {
		panic("blk: Vec.Slice: negative range")
	}
	if off+n <= int64(len(v.first)) {
		return Vec{first: v.first[off : off+n : off+n]}
	}
	var out [][]byte
	pos := int64(0)
	take := func(b []byte) {
		l := int64(len(b))
		if n > 0 && off < pos+l {
			from := max(off-pos, 0)
			to := min(l, from+n)
			if from < to {
				out = append(out, b[from:to:to])
				n -= to - from
				off += to - from
			}
		}
		pos += l
	}
	take(v.first)
	for _, b := range v.more {
		take(b)
	}
	if n > 0 {
		panic("blk: Vec.Slice: beyond the end")
	}
	return Bufs(out)
}

// Zero fills v with zeroes.
func (v Vec) Zero() {
	clear(v.first)
	for _, b := range v.more {
		clear(b)
	}
}

// CopyIn copies src into v and returns the number of bytes copied.
func (v Vec) CopyIn(src []byte) int {
	n := copy(v.first, src)
	for _, b := range v.more {
		n += copy(b, src[n:])
	}
	return n
}

// CopyOut copies v into dst and returns the number of bytes copied.
func (v Vec) CopyOut(dst []byte) int {
	n := copy(dst, v.first)
	for _, b := range v.more {
		n += copy(dst[n:], b)
	}
	return n
}
