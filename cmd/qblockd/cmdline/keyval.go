package cmdline

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"qblockd/schema/value"
)

// maxFragment is the longest allowed part of a dotted key, in bytes, maxFragments how many a key
// may have: JSON nests as deep.
const maxFragment, maxFragments = 127, 1000

// Keyval parses KEY=VALUE,... into an object whose scalars are all strings: dotted keys nest,
// objects whose keys are all numbers become arrays, ",," is a comma within a value. If
// implied is not empty, the first "KEY=" may be left out and means implied. A lone "help" or
// "?" sets help and is no member. Errors have QEMU's words.
func Keyval(params, implied string) (d *value.Dict, help bool, err error) {
	d = &value.Dict{}
	p := keyvalParser{root: d, implied: implied}
	for rest := params; rest != ""; p.implied = "" {
		if rest, err = p.one(rest); err != nil {
			return nil, false, err
		}
	}
	v, err := listify(d, "")
	if err != nil {
		return nil, false, err
	}
	// The outermost object never has index keys: a key starts with a name.
	return v.(*value.Dict), p.help, nil
}

type keyvalParser struct {
	root    *value.Dict
	implied string
	help    bool
}

// one parses one parameter and returns what follows it.
func (p *keyvalParser) one(params string) (string, error) {
	n := strings.IndexAny(params, "=,")
	if n < 0 {
		n = len(params)
	}
	if n > 0 && (n == len(params) || params[n] != '=') {
		word := params[:n]
		if word == "help" || word == "?" {
			p.help = true
			return strings.TrimPrefix(params[n:], ","), nil
		}
		if p.implied != "" {
			if err := p.put(p.root, p.implied, p.implied, word); err != nil {
				return "", err
			}
			return strings.TrimPrefix(params[n:], ","), nil
		}
	}
	key, rest := params[:n], params[n:]
	cur, last, err := p.walk(key)
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(rest, "=") {
		return "", fmt.Errorf("Expected '=' after parameter '%s'", key)
	}
	val, rest := keyvalText(rest[1:])
	return rest, p.put(cur, last, key, val)
}

// walk descends along the dotted key, creating objects, and returns the innermost one with the last
// fragment.
func (p *keyvalParser) walk(key string) (*value.Dict, string, error) {
	cur, prev := p.root, ""
	if n := strings.Count(key, "."); n >= maxFragments {
		return nil, "", fmt.Errorf("Parameter with %d parts is nested too deeply", n+1)
	}
	for pos := 0; ; {
		n := fragment(key[pos:], pos > 0)
		end := pos + n
		if n == 0 || end < len(key) && key[end] != '.' {
			return nil, "", fmt.Errorf("Invalid parameter '%s'", key)
		}
		if n > maxFragment {
			what := " fragment"
			if pos == 0 && end == len(key) {
				what = ""
			}
			return nil, "", fmt.Errorf("Parameter%s '%s' is too long", what, key[pos:end])
		}
		if pos > 0 {
			next, ok := cur.Get(prev)
			if !ok {
				next = &value.Dict{}
				cur.Set(prev, next)
			}
			if cur, ok = next.(*value.Dict); !ok {
				return nil, "", inconsistent(key[:pos-1])
			}
		}
		prev = key[pos:end]
		if end == len(key) {
			return cur, prev, nil
		}
		pos = end + 1
	}
}

func inconsistent(key string) error {
	return fmt.Errorf("Parameters '%s.*' used inconsistently", key)
}

func (p *keyvalParser) put(d *value.Dict, name, key, val string) error {
	if old, ok := d.Get(name); ok {
		if _, isText := old.(string); !isText {
			return inconsistent(key)
		}
	}
	d.Set(name, val)
	return nil
}

// keyvalText reads a value up to a single comma.
func keyvalText(s string) (val, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				return b.String(), s[i+1:]
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// fragment is the length of the index (unless first) or QAPI name that s starts with; 0: neither.
func fragment(s string, index bool) int {
	if n := len(s) - len(strings.TrimLeft(s, "0123456789")); index && n > 0 {
		return n
	}
	return qapiName(s)
}

// qapiName is the length of the QAPI name s starts with: optionally a downstream prefix
// "__RFQDN_", then a letter followed by letters, digits, '-' and '_'.
func qapiName(s string) int {
	i := 0
	if strings.HasPrefix(s, "__") {
		for i = 2; i < len(s) && (isLetter(s[i]) || isDigit(s[i]) || s[i] == '-' || s[i] == '.'); i++ {
		}
		if i == 2 || i == len(s) || s[i] != '_' {
			return 0
		}
		i++
	}
	if i == len(s) || !isLetter(s[i]) {
		return 0
	}
	for i++; i < len(s) && (isLetter(s[i]) || isDigit(s[i]) || s[i] == '-' || s[i] == '_'); i++ {
	}
	return i
}

func isDigit(c byte) bool  { return c >= '0' && c <= '9' }
func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// index reads a key that is wholly a list index, capped at MaxInt32; -1 if it is none.
func index(key string) int {
	if key == "" || strings.Trim(key, "0123456789") != "" {
		return -1
	}
	n, err := strconv.ParseUint(key, 10, 31)
	if err != nil {
		return math.MaxInt32
	}
	return int(n)
}

// listify turns objects whose keys are all indices into arrays, innermost first. path is the
// dotted key that led to d, with a dot at its end.
func listify(d *value.Dict, path string) (value.Value, error) {
	indices, names := 0, 0
	for _, m := range d.Members() {
		if index(m.Name) >= 0 {
			indices++
		} else {
			names++
		}
		sub, ok := m.Value.(*value.Dict)
		if !ok {
			continue
		}
		v, err := listify(sub, path+m.Name+".")
		if err != nil {
			return nil, err
		}
		d.Set(m.Name, v)
	}
	if indices == 0 {
		return d, nil
	}
	if names > 0 {
		return nil, fmt.Errorf("Parameters '%s*' used inconsistently", path)
	}
	list := make(value.List, d.Len())
	for _, m := range d.Members() {
		if i := index(m.Name); i < len(list) {
			list[i] = m.Value
		}
	}
	for i, v := range list {
		if v == nil {
			return nil, fmt.Errorf("Parameter '%s%d' missing", path, i)
		}
	}
	return list, nil
}

// Structured parses the argument of an option that takes JSON (when it starts with '{') or keyval.
// fromText tells that scalars are strings. A request for help is an error here.
func Structured(arg, implied string) (d *value.Dict, fromText bool, err error) {
	if strings.HasPrefix(arg, "{") {
		v, err := value.Parse(arg)
		if err != nil {
			return nil, false, err
		}
		return v.(*value.Dict), false, nil
	}
	d, help, err := Keyval(arg, implied)
	if err == nil && help {
		err = errors.New("Help is not available for this option")
	}
	return d, true, err
}
