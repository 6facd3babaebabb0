//go:build testpanic

package main

import (
	"context"
	"errors"

	"qblockd/events/panics"
	"qblockd/schema/value"
)

// bugs adds a command that is one: for the test of what bugs do to a daemon, which alone is built
// with it.
func (d *daemon) bugs() {
	d.dispatch.Handle("x-test-panic", func(_ context.Context, args *value.Dict, out []byte) ([]byte, error) {
		switch where, _ := args.Get("where"); where {
		case "command":
			panic("a bug in a command")
		case "background":
			over := make(chan error, 1)
			panics.Go("work in the background", func() { panic("a bug in the background") }, func(err error) { over <- err })
			return out, <-over
		case "everything":
			defer panics.Fatal("everything")
			panic("a bug in everything")
		}
		return out, errors.New("nowhere")
	})
}
