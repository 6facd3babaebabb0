package model

import (
	"fmt"
	"strings"
)

// Dict is a QAPI object literal with its members in the order of the text.
// Values are string, bool, Dict or List.
type Dict []Pair

// Pair is one member of a Dict.
type Pair struct {
	Key string
	Val any
}

// List is a QAPI array literal.
type List []any

// Get returns the value of a key, or nil.
func (d Dict) Get(key string) any {
	for _, p := range d {
		if p.Key == key {
			return p.Val
		}
	}
	return nil
}

// Expr is one top-level expression of a schema file.
type Expr struct {
	Dict Dict
	Doc  string // the documentation comment above it, without comment marks; may be empty
	Line int    // line where the expression starts, from 1
}

// Scan reads a schema file completely. Every byte belongs to an expression, a
// comment or white space, or Scan fails, naming file and line.
func Scan(file, text string) (exprs []Expr, err error) {
	s := &scanner{file: file, text: text, line: 1}
	defer catch(&err)
	if text != "" && !strings.HasSuffix(text, "\n") {
		s.line = 1 + strings.Count(text, "\n")
		s.fail("no newline at the end of the file")
	}
	for {
		s.blank()
		if s.pos == len(s.text) {
			return exprs, nil
		}
		if s.text[s.pos] != '{' {
			s.fail("expected '{', found %q", s.text[s.pos])
		}
		doc, line := s.takeDoc(), s.line
		exprs = append(exprs, Expr{Dict: s.dict(0), Doc: doc, Line: line})
	}
}

// scanError is what the functions that read a schema panic with.
type scanError struct{ error }

// catch, deferred, makes an error of one.
func catch(err *error) {
	if p := recover(); p != nil {
		e, ok := p.(scanError)
		if !ok {
			panic(p)
		}
		*err = e.error
	}
}

type scanner struct {
	file, text string
	pos, line  int
	doc        []string // lines of the comment block just read
	docOpen    bool     // between two "##" lines
	docEnd     int      // line after the closing "##"
}

func (s *scanner) fail(format string, args ...any) {
	panic(scanError{fmt.Errorf("%s:%d: %s", s.file, s.line, fmt.Sprintf(format, args...))})
}

// blank skips white space and comments, and gathers documentation blocks.
func (s *scanner) blank() {
	for s.pos < len(s.text) {
		switch c := s.text[s.pos]; c {
		case '\n':
			s.line++
			s.pos++
		case ' ':
			s.pos++
		case '#':
			end := s.pos + strings.IndexByte(s.text[s.pos:], '\n')
			s.comment(s.text[s.pos:end])
			s.pos = end
		default:
			if s.docOpen {
				s.fail("documentation comment without closing \"##\"")
			}
			return
		}
	}
	if s.docOpen {
		s.fail("documentation comment without closing \"##\"")
	}
}

func (s *scanner) comment(line string) {
	switch {
	case line == "##" && !s.docOpen:
		s.docOpen, s.doc = true, nil
	case line == "##":
		s.docOpen, s.docEnd = false, s.line+1
	case s.docOpen:
		t := strings.TrimPrefix(line, "#")
		s.doc = append(s.doc, strings.TrimPrefix(t, " "))
	}
}

// takeDoc returns the documentation block that ends right above the current line.
func (s *scanner) takeDoc() string {
	if s.doc == nil || s.docEnd != s.line {
		return ""
	}
	d := strings.Join(s.doc, "\n")
	s.doc = nil
	return d
}

// maxDepth bounds nesting; QAPI itself needs five levels.
const maxDepth = 16

func (s *scanner) value(depth int) any {
	s.blank()
	if s.pos == len(s.text) {
		s.fail("unexpected end of file")
	}
	switch c := s.text[s.pos]; c {
	case '{':
		return s.dict(depth)
	case '[':
		return s.list(depth)
	case '\'':
		return s.str()
	}
	for word, v := range map[string]bool{"true": true, "false": false} {
		if strings.HasPrefix(s.text[s.pos:], word) {
			s.pos += len(word)
			return v
		}
	}
	s.fail("expected a value, found %q", s.text[s.pos])
	return nil
}

func (s *scanner) dict(depth int) Dict {
	d := Dict{}
	if s.open(depth, '}') {
		return d
	}
	for {
		s.blank()
		key := s.str()
		if d.Get(key) != nil {
			s.fail("duplicate key '%s'", key)
		}
		s.blank()
		s.expect(':')
		d = append(d, Pair{key, s.value(depth + 1)})
		if s.next('}') {
			return d
		}
	}
}

func (s *scanner) list(depth int) List {
	l := List{}
	if s.open(depth, ']') {
		return l
	}
	for {
		l = append(l, s.value(depth+1))
		if s.next(']') {
			return l
		}
	}
}

// open passes an opening bracket and tells whether the closing one follows at once.
func (s *scanner) open(depth int, end byte) bool {
	if depth > maxDepth {
		s.fail("nested too deeply")
	}
	s.pos++
	s.blank()
	if s.pos < len(s.text) && s.text[s.pos] == end {
		s.pos++
		return true
	}
	return false
}

// next passes a comma, or the closing bracket, and tells whether it was the latter.
func (s *scanner) next(end byte) bool {
	s.blank()
	if s.pos < len(s.text) && s.text[s.pos] == end {
		s.pos++
		return true
	}
	s.expect(',')
	return false
}

func (s *scanner) expect(c byte) {
	if s.pos == len(s.text) {
		s.fail("unexpected end of file")
	}
	if s.text[s.pos] != c {
		s.fail("expected '%c', found %q", c, s.text[s.pos])
	}
	s.pos++
}

func (s *scanner) str() string {
	s.expect('\'')
	end := strings.IndexAny(s.text[s.pos:], "'\n")
	if end < 0 || s.text[s.pos+end] != '\'' {
		s.fail("string without end")
	}
	v := s.text[s.pos : s.pos+end]
	if v == "" {
		s.fail("empty string")
	}
	for i := 0; i < len(v); i++ {
		c := v[i]
		if !isLetter(c) && !isDigit(c) && !strings.ContainsRune("*-_. /", rune(c)) {
			s.fail("illegal character %q in '%s'", c, v)
		}
	}
	s.pos += end + 1
	return v
}

func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func isDigit(c byte) bool  { return c >= '0' && c <= '9' }
