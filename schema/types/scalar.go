package types

//lint:file-ignore U1000 what cmd/qapigen may call; which of it is used depends on the schema

import (
	"math"
	"math/big"
	"strconv"
	"strings"

	"qblockd/schema/value"
)

// keyval takes a scalar of a KEY=VALUE list.
func (d *decoder) keyval(name string) (string, bool) {
	v, ok := d.take(name)
	if !ok {
		return "", false
	}
	switch v := v.(type) {
	case string:
		return v, true
	case *value.Dict, value.List:
		return "", d.fail("Parameters '" + d.path(name) + ".*' are unexpected")
	}
	return "", d.fail("Internal error: parameter " + d.path(name) + " invalid")
}

// typed visits a value whose type JSON has.
func typed[T any](d *decoder, name string, p *T, expected string) bool {
	v, ok := d.take(name)
	if !ok {
		return false
	}
	if *p, ok = v.(T); !ok {
		return d.badType(name, expected)
	}
	return true
}

// parsed visits a scalar of a KEY=VALUE list that parse understands.
func parsed[T any](d *decoder, name string, p *T, parse func(string) (T, bool), expected string) bool {
	s, ok := d.keyval(name)
	if !ok {
		return false
	}
	if *p, ok = parse(s); !ok {
		return d.badValue(name, expected)
	}
	return true
}

func visitStr(d *decoder, name string, p *string) bool {
	if d.mode == ModeKeyval {
		s, ok := d.keyval(name)
		*p = s
		return ok
	}
	return typed(d, name, p, "string")
}

func visitBool(d *decoder, name string, p *bool) bool {
	if d.mode == ModeKeyval {
		return parsed(d, name, p, ParseBool, "'on' or 'off'")
	}
	return typed(d, name, p, "boolean")
}

// ParseBool reads a boolean of the command line.
func ParseBool(s string) (val, ok bool) {
	switch s {
	case "on", "yes", "true", "y":
		return true, true
	case "off", "no", "false", "n":
		return false, true
	}
	return false, false
}

func visitInt64(d *decoder, name string, p *int64) bool {
	if d.mode == ModeKeyval {
		return parsed(d, name, p, func(s string) (int64, bool) {
			n, ok := strtol(s)
			return n.Int64(), ok && n.IsInt64()
		}, "integer")
	}
	return typed(d, name, p, "integer")
}

// visitUint64 accepts negative numbers too and lets them wrap, as QEMU does.
func visitUint64(d *decoder, name string, p *uint64) bool {
	if d.mode == ModeKeyval {
		return parsed(d, name, p, func(s string) (uint64, bool) {
			n, ok := strtol(s)
			abs := new(big.Int).Abs(n)
			if n.Sign() < 0 {
				return -abs.Uint64(), ok && abs.IsUint64()
			}
			return abs.Uint64(), ok && abs.IsUint64()
		}, "integer")
	}
	v, ok := d.take(name)
	if !ok {
		return false
	}
	switch v := v.(type) {
	case int64:
		*p = uint64(v)
	case uint64:
		*p = v
	default:
		return d.badValue(name, "uint64")
	}
	return true
}

func intN[T int8 | int16 | int32](d *decoder, name string, p *T, typ string) bool {
	var n int64
	if !visitInt64(d, name, &n) {
		return false
	}
	*p = T(n)
	if int64(*p) != n {
		return d.fail("Parameter '" + last(name) + "' expects " + typ)
	}
	return true
}

func uintN[T uint8 | uint16 | uint32](d *decoder, name string, p *T, typ string) bool {
	var n uint64
	if !visitUint64(d, name, &n) {
		return false
	}
	*p = T(n)
	if uint64(*p) != n {
		return d.fail("Parameter '" + last(name) + "' expects " + typ)
	}
	return true
}

func visitInt8(d *decoder, name string, p *int8) bool     { return intN(d, name, p, "int8_t") }
func visitInt16(d *decoder, name string, p *int16) bool   { return intN(d, name, p, "int16_t") }
func visitInt32(d *decoder, name string, p *int32) bool   { return intN(d, name, p, "int32_t") }
func visitUint8(d *decoder, name string, p *uint8) bool   { return uintN(d, name, p, "uint8_t") }
func visitUint16(d *decoder, name string, p *uint16) bool { return uintN(d, name, p, "uint16_t") }
func visitUint32(d *decoder, name string, p *uint32) bool { return uintN(d, name, p, "uint32_t") }

// visitSize takes suffixes on the command line.
func visitSize(d *decoder, name string, p *uint64) bool {
	if d.mode == ModeKeyval {
		return parsed(d, name, p, ParseSize, "size")
	}
	return visitUint64(d, name, p)
}

func visitNumber(d *decoder, name string, p *float64) bool {
	if d.mode == ModeKeyval {
		s, ok := d.keyval(name)
		if !ok {
			return false
		}
		f, err := strconv.ParseFloat(strings.TrimLeft(s, cSpace), 64)
		if err != nil || math.IsInf(f, 0) || math.IsNaN(f) || strings.Contains(s, "_") {
			return d.badType(name, "number")
		}
		*p = f
		return true
	}
	v, ok := d.take(name)
	if !ok {
		return false
	}
	switch v := v.(type) {
	case int64:
		*p = float64(v)
	case uint64:
		*p = float64(v)
	case float64:
		*p = v
	default:
		return d.badType(name, "number")
	}
	return true
}

func visitAny(d *decoder, name string, p *value.Value) bool {
	v, ok := d.take(name)
	*p = v
	return ok
}

// visitNull visits the null of an alternate.
func visitNull(d *decoder, name string, p *bool) bool {
	*p = typed(d, name, new(value.Null), "null")
	return *p
}

// cSpace is what C's isspace accepts in front of numbers.
const cSpace = " \t\n\v\f\r"

// strtol reads an integer as C's strtol does with base 0 (decimal, 0x hexadecimal, 0
// octal), in full length, and insists on using all of s; 0 where it is none.
func strtol(s string) (*big.Int, bool) {
	s = strings.TrimLeft(s, cSpace)
	neg := strings.HasPrefix(s, "-")
	if neg || strings.HasPrefix(s, "+") {
		s = s[1:]
	}
	base := 10
	switch {
	case len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X"):
		s, base = s[2:], 16
	case len(s) > 1 && s[0] == '0':
		s, base = s[1:], 8
	}
	if s == "" || s[0] == '-' || s[0] == '+' || strings.Contains(s, "_") {
		return new(big.Int), false
	}
	n, ok := new(big.Int).SetString(s, base)
	switch {
	case !ok:
		return new(big.Int), false
	case neg:
		n.Neg(n)
	}
	return n, true
}

// ParseSize reads a size of the command line in bytes: a decimal number, possibly with a fraction,
// and an optional suffix B K M G T P E (powers of 1024, either case); or a hexadecimal number.
func ParseSize(s string) (uint64, bool) {
	s = strings.TrimLeft(s, cSpace)
	s = strings.TrimPrefix(s, "+")
	if rest, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		n, err := strconv.ParseUint(rest, 16, 64)
		return n, err == nil
	}
	shift := uint(0)
	if s != "" {
		if i := strings.IndexByte("BKMGTPE", s[len(s)-1]&^0x20); i >= 0 {
			shift, s = uint(i)*10, s[:len(s)-1]
		}
	}
	whole, frac, hasFrac := strings.Cut(s, ".")
	if strings.Trim(whole+frac, "0123456789") != "" || whole+frac == "" {
		return 0, false
	}
	r, ok := new(big.Rat).SetString("0" + whole + "." + frac + "0")
	if !ok || hasFrac && shift == 0 && strings.Trim(frac, "0") != "" {
		return 0, false // a part of a byte
	}
	r.Mul(r, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
	// Round half up.
	r.Add(r, big.NewRat(1, 2))
	n := new(big.Int).Quo(r.Num(), r.Denom())
	return n.Uint64(), n.IsUint64()
}
