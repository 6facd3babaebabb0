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

// Raw is a reply that is already encoded JSON in the reference's form (compact
// separators ", " and ": ", members in hash order).
type Raw []byte
