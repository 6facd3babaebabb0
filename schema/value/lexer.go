package value

import (
	"errors"
	"strings"
)

// Limits bounds what one message may make a Parser hold.
type Limits struct {
	TokenBytes int // length of one token and of all tokens of a message together, in bytes
	Tokens     int // number of tokens in a message
	Depth      int // brackets and braces open at once
}

// DefaultLimits are QEMU's.
var DefaultLimits = Limits{TokenBytes: 64 << 20, Tokens: 2 << 20, Depth: 1024}

var (
	errTokenBytes = errors.New("JSON token size limit exceeded")
	errTokens     = errors.New("JSON token count limit exceeded")
	errDepth      = errors.New("JSON nesting depth limit exceeded")
)

// kind is the kind of a token.
type kind uint8

const (
	kindString kind = iota
	kindInteger
	kindFloat
	kindKeyword
	kindPunct // one of {}[]:, - the text tells which
)

// lexState is what the lexer is inside of. The states of numbers are named for what was read last.
type lexState uint8

const (
	inStart lexState = iota
	inRecovery
	inString
	inEscape
	inKeyword
	inSign
	inZero
	inDigits
	inPoint
	inFraction
	inE
	inExpSign
	inExpDigits
)

// token is one token of the message being gathered; its text begins where its predecessor's ends.
type token struct {
	end  int // in Parser.text
	kind kind
}

// keepText and keepTokens bound the buffers that a Parser keeps between messages; firstText is what
// the first takes.
const (
	firstText  = 256
	keepText   = 64 << 10
	keepTokens = 4 << 10
)

// stringStop marks the bytes that end a run of plain string bytes.
var stringStop = func() (t [256]bool) {
	for c := range 0x20 {
		t[c] = true
	}
	for _, c := range []byte{'"', '\'', '\\', 0xFE, 0xFF} {
		t[c] = true
	}
	return t
}()

// lex consumes input until a message is complete or faulty (ok) or the input is used up.
//
// Tokens are recognized and errors recovered from exactly like QEMU does it: after a
// byte that fits nowhere everything up to a structural character, a control character other
// than TAB, or FE/FF is skipped.
func (p *Parser) lex() (v Value, err error, ok bool) {
	for len(p.in) > 0 {
		c := p.in[0]
		switch p.state {
		case inStart:
			v, err, ok = p.start(c)
		case inString:
			v, err, ok = p.stringRun()
		case inEscape:
			if c < 0x20 || c >= 0xFE {
				v, err, ok = p.stray(c)
			} else {
				p.state = inString
				v, err, ok = p.take(1)
			}
		case inKeyword:
			n := 0
			for n < len(p.in) && p.in[n] >= 'a' && p.in[n] <= 'z' {
				n++
			}
			if n == 0 {
				v, err, ok = p.finish(kindKeyword)
			} else {
				v, err, ok = p.take(n)
			}
		case inRecovery:
			if resyncs(c) {
				p.state = inStart
			} else {
				p.in = p.in[1:]
			}
		default:
			v, err, ok = p.number(c)
		}
		if ok {
			return v, err, true
		}
	}
	return nil, nil, false
}

// resyncs tells whether c ends the skipping after an error.
func resyncs(c byte) bool {
	switch c {
	case '[', ']', '{', '}', ':', ',', 0xFE, 0xFF:
		return true
	case '\t':
		return false
	}
	return c < 0x20
}

// start begins a token with c, or skips blanks.
func (p *Parser) start(c byte) (Value, error, bool) {
	switch {
	case c == ' ', c == '\n', c == '\r', c == '\t':
		p.in = p.in[1:]
		return nil, nil, false
	case c == '{', c == '}', c == '[', c == ']', c == ':', c == ',':
		p.add(c)
		p.in = p.in[1:]
		return p.finish(kindPunct)
	case c == '"', c == '\'':
		p.state, p.quote = inString, c
	case c >= 'a' && c <= 'z':
		p.state = inKeyword
	case c == '-':
		p.state = inSign
	case c == '0':
		p.state = inZero
	case c >= '1' && c <= '9':
		p.state = inDigits
	default:
		return p.stray(c)
	}
	return p.take(1)
}

// stringRun consumes the next run of string bytes and what ends it.
func (p *Parser) stringRun() (Value, error, bool) {
	n := 0
	for n < len(p.in) && !stringStop[p.in[n]] {
		n++
	}
	if n > 0 {
		return p.take(n)
	}
	switch c := p.in[0]; c {
	case p.quote:
		p.add(c)
		p.in = p.in[1:]
		return p.finish(kindString)
	case '\\':
		p.state = inEscape
		return p.take(1)
	case '"', '\'': // the other quote
		return p.take(1)
	default:
		return p.stray(c)
	}
}

// numberBytes are the bytes of numbers, by their place in a row of numberStates.
const numberBytes = "0123456789.eE-+"

// numberStates tell what a number is inside of after each of numberBytes, by what it was inside of
// before. inStart: the byte does not belong to it.
var numberStates = func() (t [inExpDigits + 1][len(numberBytes)]lexState) {
	for _, r := range []struct {
		last  lexState
		bytes string
		next  lexState
	}{
		{inSign, "0", inZero}, {inSign, "123456789", inDigits},
		{inZero, ".", inPoint},
		{inDigits, "0123456789", inDigits}, {inDigits, ".", inPoint}, {inDigits, "eE", inE},
		{inPoint, "0123456789", inFraction},
		{inFraction, "0123456789", inFraction}, {inFraction, "eE", inE},
		{inE, "-+", inExpSign}, {inE, "0123456789", inExpDigits},
		{inExpSign, "0123456789", inExpDigits},
		{inExpDigits, "0123456789", inExpDigits},
	} {
		for _, c := range []byte(r.bytes) {
			t[r.last][strings.IndexByte(numberBytes, c)] = r.next
		}
	}
	return t
}()

// number goes on with a number; a byte that cannot belong to it ends or breaks it.
func (p *Parser) number(c byte) (Value, error, bool) {
	next := inStart
	if i := strings.IndexByte(numberBytes, c); i >= 0 {
		next = numberStates[p.state][i]
	}
	digit := c >= '0' && c <= '9'
	switch {
	case next != inStart:
		p.state = next
		return p.take(1)
	case p.state == inDigits, p.state == inZero && !digit:
		return p.finish(kindInteger)
	case p.state == inFraction, p.state == inExpDigits:
		return p.finish(kindFloat)
	}
	return p.stray(c)
}

// tokenStart is where the text of the current token begins.
func (p *Parser) tokenStart() int {
	if n := len(p.toks); n > 0 {
		return p.toks[n-1].end
	}
	return 0
}

// take moves n bytes of input into the current token, unless that makes it too long: then the
// token is given up at the first byte too many.
func (p *Parser) take(n int) (Value, error, bool) {
	room := p.lim.TokenBytes - (len(p.text) - p.tokenStart())
	if n > room {
		p.in = p.in[room+1:]
		return p.fail(errTokenBytes, inStart)
	}
	p.add(p.in[:n]...)
	p.in = p.in[n:]
	return nil, nil, false
}

// add adds to the text. What it held may be secret: no copy of it is left behind.
func (p *Parser) add(b ...byte) {
	if n := len(p.text) + len(b); n > cap(p.text) {
		old := p.text
		p.text = append(make([]byte, 0, n+max(n/4, firstText)), old...)
		clear(old)
	}
	p.text = append(p.text, b...)
}

// stray reports the current token, broken by c, and starts skipping.
func (p *Parser) stray(c byte) (Value, error, bool) {
	text := string(p.text[p.tokenStart():])
	if c != 0 { // QEMU's text ends at a zero byte
		text += string([]byte{c})
	}
	p.in = p.in[1:]
	return p.fail(syntaxError("stray '"+text+"'"), inRecovery)
}

// fail drops what has been gathered and reports err.
func (p *Parser) fail(err error, next lexState) (Value, error, bool) {
	p.state = next
	p.clear()
	return nil, err, true
}

// clear forgets the message being gathered.
func (p *Parser) clear() {
	p.open, p.openSquare = 0, 0
	clear(p.text)
	if cap(p.text) > keepText {
		p.text = nil
	}
	if cap(p.toks) > keepTokens {
		p.toks = nil
	}
	p.text, p.toks = p.text[:0], p.toks[:0]
}

// finish adds the current token to the message and, when no bracket is left open or one was
// closed too often, parses the message.
func (p *Parser) finish(k kind) (Value, error, bool) {
	p.state = inStart
	from := p.tokenStart()
	if k == kindPunct {
		switch p.text[from] {
		case '{':
			p.open++
		case '}':
			p.open--
		case '[':
			p.openSquare++
		case ']':
			p.openSquare--
		}
	}
	switch {
	case len(p.text)+1 > p.lim.TokenBytes:
		return p.fail(errTokenBytes, inStart)
	case len(p.toks)+1 > p.lim.Tokens:
		return p.fail(errTokens, inStart)
	case p.open+p.openSquare > p.lim.Depth:
		return p.fail(errDepth, inStart)
	}
	p.toks = append(p.toks, token{len(p.text), k})
	if (p.open > 0 || p.openSquare > 0) && p.open >= 0 && p.openSquare >= 0 {
		return nil, nil, false
	}
	return p.message()
}
