package qmp

import (
	"context"
	"strings"
	"testing"

	"qblockd/schema"
	"qblockd/schema/value"
)

// TestReadOnlyCommands: what a read-only monitor takes exists, and has all commands that ask.
func TestReadOnlyCommands(t *testing.T) {
	there := map[string]bool{}
	for _, c := range schema.Commands() {
		there[c] = true
		if strings.HasPrefix(c, "query-") && !readOnly[c] {
			t.Errorf("%s is not allowed: does it change anything?", c)
		}
	}
	for c := range readOnly {
		if !there[c] {
			t.Errorf("there is no command %s", c)
		}
	}
}

// TestReadOnlyMonitor has a client that may only ask, in band and out of band.
func TestReadOnlyMonitor(t *testing.T) {
	d := testDispatcher()
	ran := make(chan string, 10)
	note := func(name string) func(context.Context, *value.Dict, []byte) ([]byte, error) {
		return func(_ context.Context, _ *value.Dict, out []byte) ([]byte, error) {
			ran <- name
			return out, nil
		}
	}
	d.Handle("object-add", note("object-add"))
	d.HandleOOB("block-job-pause", note("block-job-pause"))
	d.HandleOOB("query-block", note("query-block"))
	c := serve(t, NewMonitor(d, nil, Options{ReadOnly: true}))
	c.line() // the greeting
	c.send(`{"execute":"object-add"}`)
	c.expect(`{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}`)
	c.send(`{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}`)
	c.expect(`{"return": {}}`)
	refused := func(name string) string {
		return `{"id": 1, "error": {"class": "GenericError", "desc": "The command ` + name +
			` is not allowed on a read-only monitor"}}`
	}
	c.send(`{"execute":"object-add","id":1}`)
	c.expect(refused("object-add"))
	c.send(`{"exec-oob":"block-job-pause","id":1}`)
	c.expect(refused("block-job-pause"))
	c.send(`{"execute":"quit","id":1}`)
	c.expect(refused("quit"))
	c.send(`{"execute":"nonsense"}`)
	c.expect(`{"error": {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}}`)
	for _, how := range []string{"execute", "exec-oob"} {
		c.send(`{"` + how + `":"query-block","id":1}`)
		c.expect(`{"return": {}, "id": 1}`)
	}
	if a, b := <-ran, <-ran; a != "query-block" || b != "query-block" || len(ran) > 0 {
		t.Errorf("%s and %s were executed, and %d more", a, b, len(ran))
	}
}
