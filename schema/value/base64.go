package value

import (
	"errors"
	"strings"
)

const base64Digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

// Base64 decodes base64 as leniently as QEMU: padding counts as zero bits wherever it stands, and
// shortens its group only by its last characters; line feeds are skipped; an incomplete last group
// is dropped.
func Base64(s string) ([]byte, error) { return Base64InPlace([]byte(s)) }

// Base64InPlace is Base64 of b, whose memory it returns the beginning of.
func Base64InPlace(b []byte) ([]byte, error) {
	out := b[:0] // never longer than what has been read
	var group uint32
	var last [2]byte // the two characters before
	n := 0
	for _, c := range b {
		digit := max(strings.IndexByte(base64Digits, c), 0)
		switch {
		case c == '\n':
			continue
		case c == 0:
			return nil, errors.New("Base64 data contains embedded NUL characters")
		case digit == 0 && c != 'A' && c != '=':
			return nil, errors.New("Base64 data contains invalid characters")
		}
		group = group<<6 | uint32(digit)
		last[0], last[1] = last[1], c
		if n++; n%4 != 0 {
			continue
		}
		out = append(out, byte(group>>16))
		if last[0] != '=' {
			out = append(out, byte(group>>8))
		}
		if last[1] != '=' {
			out = append(out, byte(group))
		}
	}
	return out, nil
}
