// Package cmdline reads the command line dialects of qemu-storage-daemon: getopt_long's
// scanning, key=value options with dotted keys (keyval), and the older option syntax of
// --chardev. It is pure: words in, values or errors out.
package cmdline

import (
	"errors"
	"fmt"
	"strings"
)

// Option describes one option of a Scanner.
type Option struct {
	Long  string // without dashes
	Short byte   // 0: none
	Arg   bool   // takes an argument
}

// Item is one scanned option. Option is nil for a word that is no option; Arg is then the word.
type Item struct {
	Option *Option
	Arg    string
	// Words are the words of the command line that the item came from, for error messages.
	Words []string
}

// Where is how error messages name the item: its words, joined by blanks.
func (it Item) Where() string { return strings.Join(it.Words, " ") }

// Scan splits args (without the program's name) into items, strictly in order. Long options may be
// abbreviated while unambiguous; "--" ends the scan and what follows it is ignored, as with
// getopt_long(3) and a leading '-' in its option string. The error has getopt's words. Items
// before the error are returned too.
func Scan(args []string, options []Option) ([]Item, error) {
	s := scanner{args: args, options: options}
	for len(s.args) > 0 && s.args[0] != "--" {
		if err := s.word(); err != nil {
			return s.items, err
		}
	}
	return s.items, nil
}

type scanner struct {
	args    []string
	options []Option
	items   []Item
}

func (s *scanner) word() error {
	w := s.args[0]
	switch {
	case strings.HasPrefix(w, "--"):
		return s.long(w)
	case len(w) > 1 && w[0] == '-':
		return s.short(w)
	}
	s.args = s.args[1:]
	s.items = append(s.items, Item{Arg: w, Words: []string{w}})
	return nil
}

func (s *scanner) long(w string) error {
	name, val, hasVal := strings.Cut(w[2:], "=")
	o, err := s.find(name)
	if err != nil {
		return err
	}
	n := 1
	switch {
	case !o.Arg && hasVal:
		return fmt.Errorf("option '--%s' doesn't allow an argument", o.Long)
	case o.Arg && !hasVal:
		if len(s.args) < 2 {
			return fmt.Errorf("option '--%s' requires an argument", o.Long)
		}
		val, n = s.args[1], 2
	}
	s.items = append(s.items, Item{Option: o, Arg: val, Words: s.args[:n:n]})
	s.args = s.args[n:]
	return nil
}

func (s *scanner) find(name string) (*Option, error) {
	var hits []*Option
	for i := range s.options {
		o := &s.options[i]
		if o.Long == name {
			return o, nil
		}
		if strings.HasPrefix(o.Long, name) {
			hits = append(hits, o)
		}
	}
	switch len(hits) {
	case 0:
		return nil, fmt.Errorf("unrecognized option '--%s'", name)
	case 1:
		return hits[0], nil
	}
	text := "option '--" + name + "' is ambiguous; possibilities:"
	for _, o := range hits {
		text += " '--" + o.Long + "'"
	}
	return nil, errors.New(text)
}

func (s *scanner) short(w string) error {
	for i := 1; i < len(w); i++ {
		o := s.byLetter(w[i])
		if o == nil {
			return fmt.Errorf("invalid option -- '%c'", w[i])
		}
		if !o.Arg {
			s.items = append(s.items, Item{Option: o, Words: []string{w}})
			continue
		}
		n, val := 1, w[i+1:]
		if val == "" {
			if len(s.args) < 2 {
				return fmt.Errorf("option requires an argument -- '%c'", w[i])
			}
			n, val = 2, s.args[1]
		}
		s.items = append(s.items, Item{Option: o, Arg: val, Words: s.args[:n:n]})
		s.args = s.args[n:]
		return nil
	}
	s.args = s.args[1:]
	return nil
}

func (s *scanner) byLetter(c byte) *Option {
	for i := range s.options {
		if s.options[i].Short == c {
			return &s.options[i]
		}
	}
	return nil
}
