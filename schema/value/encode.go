package value

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Append appends v as JSON in the form of the wire: separators ", " and ": ", members of
// objects by ascending Bucket and within a bucket the later inserted first, ASCII only.
// A dynamic type that the package comment does not list is a bug of the caller and panics.
func Append(b []byte, v Value) []byte {
	switch v := v.(type) {
	case Null, nil:
		return append(b, "null"...)
	case bool:
		return strconv.AppendBool(b, v)
	case int64:
		return strconv.AppendInt(b, v, 10)
	case uint64:
		return strconv.AppendUint(b, v, 10)
	case float64:
		return AppendDouble(b, v)
	case string:
		return AppendString(b, v)
	case List:
		b = append(b, '[')
		for i := range v {
			if i > 0 {
				b = append(b, ", "...)
			}
			b = Append(b, v[i])
		}
		return append(b, ']')
	case *Dict:
		return appendDict(b, v)
	}
	panic(fmt.Sprintf("value: %T is not a JSON value", v))
}

func appendDict(b []byte, d *Dict) []byte {
	b = append(b, '{')
	var small [16]int
	for i, at := range d.hashOrder(small[:0]) {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = AppendString(b, d.members[at].Name)
		b = append(b, ": "...)
		b = Append(b, d.members[at].Value)
	}
	return append(b, '}')
}

// hashOrder appends the indexes of the members in the order in which they are printed.
func (d *Dict) hashOrder(idx []int) []int {
	n := d.Len()
	if n == 1 {
		return append(idx, 0)
	}
	// Bucket in the high bits, age in the low ones: sorting the sums sorts by both.
	for i := range n {
		idx = append(idx, int(Bucket(d.members[i].Name))<<32|(n-1-i))
	}
	slices.Sort(idx)
	for i := range idx {
		idx[i] = n - 1 - idx[i]&math.MaxUint32
	}
	return idx
}

// EachHashed calls f for the members in the order in which QEMU visits and prints
// them, until f returns false.
func (d *Dict) EachHashed(f func(name string, v Value) bool) {
	var small [16]int
	for _, at := range d.hashOrder(small[:0]) {
		if !f(d.members[at].Name, d.members[at].Value) {
			return
		}
	}
}

const hexDigits = "0123456789ABCDEF"

// AppendString appends s as a JSON string in ASCII: everything outside 0x20..0x7E as \uXXXX
// with capital digits, in surrogate pairs beyond U+FFFF, with the short forms of JSON where
// they exist. '/', '<', '>' and '&' stay plain. Each sequence that is not valid UTF-8
// becomes \uFFFD.
func AppendString(b []byte, s string) []byte {
	b = append(b, '"')
	for i := 0; i < len(s); {
		start := i
		for i < len(s) && s[i] >= 0x20 && s[i] < 0x7F && s[i] != '"' && s[i] != '\\' {
			i++
		}
		b = append(b, s[start:i]...)
		if i == len(s) {
			break
		}
		cp, n := decodeRune(s[i:])
		b = appendEscape(b, cp)
		i += n
	}
	return append(b, '"')
}

// escaped are the characters that are written as a backslash and one of escapeLetters.
const escaped, escapeLetters = "\b\f\n\r\t", "bfnrt"

func appendEscape(b []byte, cp int) []byte {
	switch cp {
	case '"', '\\':
		return append(b, '\\', byte(cp))
	case '\b', '\f', '\n', '\r', '\t':
		return append(b, '\\', escapeLetters[strings.IndexByte(escaped, byte(cp))])
	case invalidRune:
		cp = 0xFFFD
	}
	if cp > 0xFFFF {
		cp -= 0x10000
		b = appendHex4(b, 0xD800+cp>>10)
		cp = 0xDC00 + cp&0x3FF
	}
	return appendHex4(b, cp)
}

func appendHex4(b []byte, u int) []byte {
	return append(b, '\\', 'u', hexDigits[u>>12&15], hexDigits[u>>8&15], hexDigits[u>>4&15], hexDigits[u&15])
}

// AppendDouble appends f with 17 significant digits, as C's "%.17g" prints it: 0.1 becomes
// 0.10000000000000001 and 1e10 becomes 10000000000. Infinities, which a client can only
// produce by writing a number such as 1e999, become inf and -inf like in QEMU.
func AppendDouble(b []byte, f float64) []byte {
	switch {
	case math.IsInf(f, 1):
		return append(b, "inf"...)
	case math.IsInf(f, -1):
		return append(b, "-inf"...)
	case math.IsNaN(f):
		return append(b, "nan"...)
	}
	return strconv.AppendFloat(b, f, 'g', 17, 64)
}

// Indent appends src, one value encoded by this package, in the layout of pretty=on: four
// spaces a level, a line break after each '{', '[' and ',' and before each '}' and ']', so that
// empty objects and arrays take two lines. eol is what a line ends in; the wire uses "\r\n".
func Indent(dst, src []byte, eol string) []byte {
	depth := 0
	for i := 0; i < len(src); i++ {
		switch c := src[i]; c {
		case '"':
			end := i + 1
			for src[end] != '"' {
				if src[end] == '\\' {
					end++
				}
				end++
			}
			dst = append(dst, src[i:end+1]...)
			i = end
		case '{', '[':
			depth++
			dst = append(dst, c)
			if next := src[i+1]; next != '}' && next != ']' {
				dst = appendBreak(dst, eol, depth)
			}
		case '}', ']':
			depth--
			dst = append(appendBreak(dst, eol, depth), c)
		case ',':
			dst = appendBreak(append(dst, c), eol, depth)
			if i+1 < len(src) && src[i+1] == ' ' {
				i++
			}
		default:
			dst = append(dst, c)
		}
	}
	return dst
}

func appendBreak(b []byte, eol string, depth int) []byte {
	b = append(b, eol...)
	for range depth {
		b = append(b, "    "...)
	}
	return b
}
