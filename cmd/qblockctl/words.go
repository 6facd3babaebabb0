package main

import (
	"errors"
	"fmt"
	"strings"
)

// splitLine takes a line of the shell apart into words. Blanks separate them, but not within
// quotes, nor within the brackets of a JSON value. '...' and "..." are taken off where a word or a
// value begins with '...', and where a whole word is quoted; other quotes belong to JSON and stay.
func splitLine(line string) ([]string, error) {
	words, rest, err := scanLine(line)
	if err != nil {
		return nil, err
	}
	if rest != "" {
		words = append(words, rest)
	}
	return words, nil
}

// errOpen: the line ends within quotes or brackets.
var errOpen = errors.New("is not closed")

// scanLine returns the words of a line that are complete, and the last one, which a blank does not
// follow.
func scanLine(line string) (words []string, last string, err error) {
	var word strings.Builder
	depth, inWord := 0, false
	end := func() {
		if inWord {
			words = append(words, word.String())
		}
		word.Reset()
		inWord = false
	}
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case c == '\'' && depth == 0:
			// As in a POSIX shell: all up to the next quote, as it is.
			n := strings.IndexByte(line[i+1:], '\'')
			if n < 0 {
				return words, word.String() + line[i+1:], fmt.Errorf("the quote at '%.20s' %w", line[i:], errOpen)
			}
			word.WriteString(line[i+1 : i+1+n])
			inWord = true
			i += n + 1
		case c == '"':
			// A JSON string, with its quotes: key="12" is a string, not a number.
			n := stringEnd(line[i:])
			if n < 0 {
				return words, word.String() + line[i:], fmt.Errorf("the quote at '%.20s' %w", line[i:], errOpen)
			}
			word.WriteString(line[i : i+n])
			inWord = true
			i += n - 1
		case depth == 0 && (c == ' ' || c == '\t'):
			end()
		default:
			switch c {
			case '{', '[':
				depth++
			case '}', ']':
				depth--
			}
			word.WriteByte(c)
			inWord = true
		}
	}
	if depth > 0 {
		return words, word.String(), fmt.Errorf("a bracket of '%.20s' %w", word.String(), errOpen)
	}
	return words, word.String(), nil
}

// stringEnd is the length of the JSON string that s begins with; -1 if it does not end.
func stringEnd(s string) int {
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return -1
}
