package value

import (
	"cmp"
	"errors"
	"strconv"
	"strings"
	"unsafe"
)

// A Parser cuts a stream of bytes into JSON values, with QEMU's leniencies and limits
// and in its words for errors.
//
// Use: Feed a chunk, call Next until it reports that there is nothing more, Feed the next one.
// How the stream is cut into chunks makes no difference to what comes out. A value is complete
// with its closing bracket; a bare number or keyword only with the byte after it. Beyond JSON
// it accepts strings in single quotes, \' in either kind of string, and U+0000 as C0 80; strings
// keep U+0000 in that form.
//
// The memory held is bounded by the Limits and by what Feed was given.
type Parser struct {
	lim   Limits
	state lexState
	quote byte   // inString, inEscape: what ends the string
	in    []byte // input not yet looked at; belongs to the caller of Feed

	text             []byte  // the text of toks and of the token being read
	toks             []token // the message being gathered
	open, openSquare int     // braces and brackets opened minus those closed

	names map[string]string // member names seen before, at most maxNames of them
}

// NewParser returns a parser with the given limits; fields that are 0 take DefaultLimits.
func NewParser(lim Limits) *Parser {
	return &Parser{lim: Limits{
		TokenBytes: cmp.Or(lim.TokenBytes, DefaultLimits.TokenBytes),
		Tokens:     cmp.Or(lim.Tokens, DefaultLimits.Tokens),
		Depth:      cmp.Or(lim.Depth, DefaultLimits.Depth),
	}}
}

// Feed gives the parser its next input. The previous input must be used up (Next returned false).
// The parser reads b until then and keeps no reference to it afterwards.
func (p *Parser) Feed(b []byte) {
	if len(p.in) != 0 {
		panic("value: Feed with input left")
	}
	p.in = b
}

// Next returns the next value or the next syntax error; ok is false when more input is needed.
func (p *Parser) Next() (v Value, err error, ok bool) {
	v, err, ok = p.lex()
	if !ok {
		p.in = nil
	}
	return v, err, ok
}

// Held is how many bytes of memory the message takes that is being gathered, buffers included.
func (p *Parser) Held() int { return cap(p.text) + cap(p.toks)*int(unsafe.Sizeof(token{})) }

// flush ends the stream. It returns what the end completes or breaks.
func (p *Parser) flush() (v Value, err error, ok bool) {
	switch p.state {
	case inStart, inRecovery:
	case inKeyword:
		v, err, ok = p.finish(kindKeyword)
	case inZero, inDigits:
		v, err, ok = p.finish(kindInteger)
	case inFraction, inExpDigits:
		v, err, ok = p.finish(kindFloat)
	default:
		p.in = []byte{0}
		v, err, ok = p.stray(0)
	}
	p.state = inStart
	if ok || len(p.toks) == 0 {
		return v, err, ok
	}
	return p.message()
}

// Parse returns the one JSON value that s consists of. It is lenient like Parser; its errors
// are those of QEMU: the syntax errors of Parser, "Expecting a JSON value" and
// "Expecting at most one JSON value".
func Parse(s string) (Value, error) {
	p := NewParser(Limits{})
	p.Feed([]byte(s))
	var got Value
	var have bool
	for {
		v, err, ok := p.Next()
		if !ok {
			if v, err, ok = p.flush(); !ok {
				break
			}
		}
		switch {
		case have:
			return nil, errors.New("Expecting at most one JSON value")
		case err != nil:
			return nil, err
		}
		got, have = v, true
	}
	if !have {
		return nil, errors.New("Expecting a JSON value")
	}
	return got, nil
}

// maxSyntaxText bounds the part of a syntax error after its prefix, in bytes.
const maxSyntaxText = 1023

func syntaxError(text string) error { return errors.New("JSON parse error, " + text) }

var (
	errValue     = syntaxError("expecting value")
	errPremature = syntaxError("premature EOI")
	errKey       = syntaxError("key is not a string in object")
	errColon     = syntaxError("missing : in object pair")
	errDuplicate = syntaxError("duplicate key")
	errObjectSep = syntaxError("expected separator in dict")
	errListSep   = syntaxError("expected separator in list")
	errEscape    = syntaxError("invalid escape sequence in string")
	errUTF8      = syntaxError("invalid UTF-8 sequence in string")
)

// message parses the gathered tokens as one value.
func (p *Parser) message() (Value, error, bool) {
	r := reader{p: p}
	v, err := r.value()
	p.clear()
	return v, err, true
}

// Wipe overwrites a string that a Parser has made and that nobody else uses. Others cannot be
// written to, or are not for one user alone.
func Wipe(s string) {
	if len(s) > 1 { // the short ones are shared by all
		clear(unsafe.Slice(unsafe.StringData(s), len(s)))
	}
}

// reader walks over the tokens of a message.
type reader struct {
	p    *Parser
	next int // index of the next token
	from int // where its text begins
}

// pop returns the kind and text of the next token, and false at the end. The text is valid as
// long as the message is.
func (r *reader) pop() (kind, []byte, bool) {
	if r.next == len(r.p.toks) {
		return 0, nil, false
	}
	t := r.p.toks[r.next]
	text := r.p.text[r.from:t.end]
	r.next++
	r.from = t.end
	return t.kind, text, true
}

// skip consumes the next token if it is the punctuation c.
func (r *reader) skip(c byte) bool {
	if r.next < len(r.p.toks) && r.p.toks[r.next].kind == kindPunct && r.p.text[r.from] == c {
		r.from = r.p.toks[r.next].end
		r.next++
		return true
	}
	return false
}

func (r *reader) value() (Value, error) {
	k, text, ok := r.pop()
	if !ok {
		return nil, errPremature
	}
	switch k {
	case kindString:
		return r.str(text)
	case kindInteger:
		return integer(text), nil
	case kindFloat:
		return double(text), nil
	case kindKeyword:
		return keyword(text)
	}
	switch text[0] {
	case '{':
		return r.object()
	case '[':
		return r.list()
	}
	return nil, errValue
}

// object reads members up to the closing brace; the opening one is consumed.
func (r *reader) object() (Value, error) {
	d := &Dict{}
	if r.skip('}') {
		return d, nil
	}
	for {
		if err := r.member(d); err != nil {
			return nil, err
		}
		if over, err := r.separator('}', errObjectSep); over || err != nil {
			return d, err
		}
	}
}

// separator consumes a comma, or the bracket that is the end: then over is true.
func (r *reader) separator(end byte, fault error) (over bool, err error) {
	k, text, ok := r.pop()
	switch {
	case !ok:
		return false, errPremature
	case k != kindPunct || text[0] != end && text[0] != ',':
		return false, fault
	}
	return text[0] == end, nil
}

func (r *reader) member(d *Dict) error {
	var name string
	if r.next < len(r.p.toks) && r.p.toks[r.next].kind == kindString {
		_, text, _ := r.pop()
		var err error
		if name, err = r.name(text); err != nil {
			return err
		}
	} else {
		// Anything else is read to its end first: a fault inside it comes before this one.
		if _, err := r.value(); err != nil {
			return err
		}
		return errKey
	}
	k, text, ok := r.pop()
	if !ok {
		return errPremature
	}
	if k != kindPunct || text[0] != ':' {
		return errColon
	}
	v, err := r.value()
	if err != nil {
		return err
	}
	if d.find(name) >= 0 {
		return errDuplicate
	}
	if d.members == nil {
		d.members = make([]Member, 0, 4)
	}
	d.add(name, v)
	return nil
}

// list reads elements up to the closing bracket; the opening one is consumed.
func (r *reader) list() (Value, error) {
	l := List{}
	if r.skip(']') {
		return l, nil
	}
	for {
		v, err := r.value()
		if err != nil {
			return nil, err
		}
		l = append(l, v)
		if over, err := r.separator(']', errListSep); over || err != nil {
			return l, err
		}
	}
}

func keyword(text []byte) (Value, error) {
	switch string(text) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	case "null":
		return Null{}, nil
	}
	msg := "invalid keyword '" + string(text) + "'"
	if len(msg) > maxSyntaxText {
		msg = msg[:maxSyntaxText]
	}
	return nil, syntaxError(msg)
}

// integer returns an int64 where the number fits, else a uint64, else a float64.
func integer(text []byte) Value {
	if i, err := strconv.ParseInt(string(text), 10, 64); err == nil {
		return i
	}
	if text[0] != '-' {
		if u, err := strconv.ParseUint(string(text), 10, 64); err == nil {
			return u
		}
	}
	return double(text)
}

// double rounds to the nearest float64; what is too large becomes infinite.
func double(text []byte) Value {
	f, _ := strconv.ParseFloat(string(text), 64)
	return f
}

const (
	maxNames   = 512 // names kept for the next message
	maxNameLen = 32
)

// name is str for member names: they recur, so one copy of each is kept.
func (r *reader) name(text []byte) (string, error) {
	body := text[1 : len(text)-1]
	if s, ok := r.p.names[string(body)]; ok {
		return s, nil
	}
	s, err := r.str(text)
	// Only a name without escapes is its own key.
	if err == nil && len(body) <= maxNameLen && s == string(body) && len(r.p.names) < maxNames {
		if r.p.names == nil {
			r.p.names = make(map[string]string)
		}
		r.p.names[s] = s
	}
	return s, err
}

// str decodes a string token, quotes included.
func (r *reader) str(text []byte) (string, error) {
	body := text[1 : len(text)-1]
	plain := true
	for _, c := range body {
		if c == '\\' || c >= 0x80 {
			plain = false
			break
		}
	}
	if plain {
		return string(body), nil
	}
	out := make([]byte, 0, len(body))
	for i := 0; i < len(body); {
		c := body[i]
		switch {
		case c == '\\':
			var n int
			var err error
			// The closing quote is handed over too: an error text may show it.
			if out, n, err = unescape(out, text[i+1:]); err != nil {
				return "", err
			}
			i += n
		case c < 0x80:
			out = append(out, c)
			i++
		default:
			cp, n := decodeRune(body[i:])
			if cp == invalidRune {
				return "", errUTF8
			}
			out = append(out, body[i:i+n]...)
			i += n
		}
	}
	return string(out), nil
}

// unescape decodes the escape sequence at the start of s and returns its length.
func unescape(out, s []byte) ([]byte, int, error) {
	switch s[1] {
	case '"', '\'', '\\', '/':
		return append(out, s[1]), 2, nil
	case 'b', 'f', 'n', 'r', 't':
		return append(out, escaped[strings.IndexByte(escapeLetters, s[1])]), 2, nil
	case 'u':
	default:
		return nil, 0, errEscape
	}
	cp, n := hex4(s[2:]), 6
	if cp >= 0xD800 && cp <= 0xDBFF && len(s) > 7 && s[6] == '\\' && s[7] == 'u' {
		if low := hex4(s[8:]); low >= 0xDC00 && low <= 0xDFFF {
			cp, n = 0x10000+cp&0x3FF<<10+low&0x3FF, 12
		} else {
			cp = invalidRune
		}
	}
	if cp < 0 || !validRune(cp) {
		return nil, 0, syntaxError(string(s[:min(n, len(s))]) + " is not a valid Unicode character")
	}
	return appendRune(out, cp), n, nil
}

// hex4 reads four hexadecimal digits; it returns invalidRune if there are not four.
func hex4(s []byte) int {
	if len(s) < 4 {
		return invalidRune
	}
	cp, err := strconv.ParseUint(string(s[:4]), 16, 16)
	if err != nil {
		return invalidRune
	}
	return int(cp)
}
