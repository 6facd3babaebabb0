package types

import (
	"strconv"

	"qblockd/schema/value"
)

func appendBool(b []byte, v bool) []byte { return strconv.AppendBool(b, v) }

func appendInt[T ~int8 | ~int16 | ~int32 | ~int64](b []byte, v T) []byte {
	return strconv.AppendInt(b, int64(v), 10)
}

func appendUint[T ~uint8 | ~uint16 | ~uint32 | ~uint64](b []byte, v T) []byte {
	return strconv.AppendUint(b, uint64(v), 10)
}

func appendEnum[T ~string](b []byte, v T) []byte { return value.AppendString(b, string(v)) }

// appendKey starts a member: a separator unless it is the first, and the quoted key,
// which needs no escapes.
func appendKey(b []byte, key string) []byte {
	if b[len(b)-1] != '{' {
		b = append(b, ", "...)
	}
	b = append(b, '"')
	b = append(b, key...)
	return append(b, `": `...)
}

func appendList[T any](b []byte, l []T, elem func([]byte, T) []byte) []byte {
	b = append(b, '[')
	for i, v := range l {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = elem(b, v)
	}
	return append(b, ']')
}
