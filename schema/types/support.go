package types

import (
	"context"

	"qblockd/schema/value"
)

// HandlerFunc executes one command: args is never nil; on success the encoded
// reply value is appended to out. It blocks as long as the command takes.
type HandlerFunc func(ctx context.Context, args *value.Dict, out []byte) ([]byte, error)

// Registrar takes the handlers of commands; qmp.Dispatcher is one.
type Registrar interface {
	// Handle registers the one handler of a command; a second one panics.
	Handle(command string, f HandlerFunc)
}

// Raw is a reply that is already encoded JSON in QEMU's form (compact
// separators ", " and ": ", members in hash order).
type Raw []byte

// WellFormedID tells whether id is one as clients may give it to nodes, jobs, exports, objects and
// devices: a letter, then letters, digits and "-._".
func WellFormedID(id string) bool {
	for i := 0; i < len(id); i++ {
		c := id[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || !(c >= '0' && c <= '9') && c != '-' && c != '.' && c != '_') {
			return false
		}
	}
	return id != ""
}

// Or is what p points to; def where the member was left out.
func Or[T any](p *T, def T) T {
	if p == nil {
		return def
	}
	return *p
}
