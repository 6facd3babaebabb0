// Package check validates the arguments of commands against their JSON Schemas.
//
// It is a second opinion: the daemon decodes with schema/types, whose errors are
// QAPI's sentences, while clients such as qblockctl check what they are about to send
// with the schemas that are published. Both accept and refuse the same arguments,
// which a fuzz test watches, save for these:
//
//   - numbers such as 1.0 and 1e3 are integers in JSON Schema, but not in QAPI;
//   - QAPI accepts negative numbers where the type is uint64 or size, and wraps them.
//
// A schema is compiled when it is first needed: of a union that a command takes as its
// arguments only the branch that was chosen, of commands without arguments nothing.
package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v5"

	"qblockd/schema"
	"qblockd/schema/value"
)

// ErrUnknownCommand is returned for commands that are not in the schema.
var ErrUnknownCommand = errors.New("unknown command")

// Validate tells what is wrong with the arguments of a command. A nil args counts as
// an empty object. The error's text is for people; it names the offending member but
// does not follow QAPI's wording. Validate may be called from several goroutines.
func Validate(command string, args value.Value) error {
	c, err := lookup(command)
	if err != nil {
		return err
	}
	if args == nil {
		args = &value.Dict{}
	}
	return c.validate(args)
}

var (
	mu       sync.Mutex
	commands map[string]*compiled // +checklocks:mu
)

// compiled is a command's schema, as far as it was needed.
type compiled struct {
	url  string
	head head

	mu       sync.Mutex
	compiler *jsonschema.Compiler
	// by JSON pointer
	branches map[string]*jsonschema.Schema // +checklocks:mu
}

// head is what has to be known of a schema before anything is compiled.
type head struct {
	Properties map[string]struct{}
	AllOf      []struct {
		If struct {
			Properties map[string]struct{ Const string }
		}
		Then struct {
			Ref string `json:"$ref"`
		}
	}
}

func lookup(command string) (*compiled, error) {
	mu.Lock()
	defer mu.Unlock()
	if c := commands[command]; c != nil {
		return c, nil
	}
	text := schema.JSONSchema(command)
	if text == nil {
		return nil, fmt.Errorf("%w: %s", ErrUnknownCommand, command)
	}
	c := &compiled{url: "qmp:///" + command, branches: map[string]*jsonschema.Schema{}}
	if err := json.Unmarshal(text, &c.head); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", command, err)
	}
	c.compiler = jsonschema.NewCompiler()
	c.compiler.Draft = jsonschema.Draft2020
	if err := c.compiler.AddResource(c.url, bytes.NewReader(text)); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", command, err)
	}
	if commands == nil {
		commands = map[string]*compiled{}
	}
	commands[command] = c
	return c, nil
}

func (c *compiled) validate(args value.Value) error {
	d, ok := args.(*value.Dict)
	if ok && d.Len() == 0 && len(c.head.Properties) == 0 {
		return nil
	}
	s, err := c.compile(c.branch(d))
	if err != nil {
		return err
	}
	return s.Validate(plain(args))
}

// branch points to the part of the schema that applies to d: the branch that its tag
// selects, or all of it.
func (c *compiled) branch(d *value.Dict) string {
	for _, b := range c.head.AllOf {
		for tag, want := range b.If.Properties {
			if v, _ := d.Get(tag); v == want.Const {
				return b.Then.Ref
			}
		}
	}
	return ""
}

func (c *compiled) compile(pointer string) (*jsonschema.Schema, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.branches[pointer]; s != nil {
		return s, nil
	}
	s, err := c.compiler.Compile(c.url + pointer)
	if err != nil {
		return nil, err
	}
	c.branches[pointer] = s
	return s, nil
}

// plain turns a value into what jsonschema expects.
func plain(v value.Value) any {
	switch v := v.(type) {
	case value.Null:
		return nil
	case int64:
		return json.Number(strconv.FormatInt(v, 10))
	case uint64:
		return json.Number(strconv.FormatUint(v, 10))
	case value.List:
		l := make([]any, len(v))
		for i, e := range v {
			l[i] = plain(e)
		}
		return l
	case *value.Dict:
		m := make(map[string]any, v.Len())
		for _, e := range v.Members() {
			m[e.Name] = plain(e.Value)
		}
		return m
	}
	return v
}
