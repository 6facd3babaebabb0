// Package check validates the arguments of commands against their JSON Schemas, for tests: the
// daemon decodes with schema/types, whose errors are QAPI's sentences, and the schemas are for
// others to check what they are about to send. Both accept and refuse the same arguments, which a
// fuzz test watches, save for these:
//
//   - numbers such as 1.0 and 1e3 are integers in JSON Schema, but not in QAPI;
//   - QAPI accepts negative numbers where the type is uint64 or size, and wraps them.
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

var (
	mu sync.Mutex
	// those that were needed, compiled
	schemas = map[string]*jsonschema.Schema{} // +checklocks:mu
)

// Validate tells what is wrong with the arguments of a command. A nil args counts as an empty
// object. The error's text is for people; it names the offending member but does not follow QAPI's
// wording. Validate may be called from several goroutines.
func Validate(command string, args value.Value) error {
	s, err := compiled(command)
	if err != nil {
		return err
	}
	if args == nil {
		args = &value.Dict{}
	}
	return s.Validate(plain(args))
}

func compiled(command string) (*jsonschema.Schema, error) {
	mu.Lock()
	defer mu.Unlock()
	if s := schemas[command]; s != nil {
		return s, nil
	}
	text := schema.JSONSchema(command)
	if text == nil {
		return nil, fmt.Errorf("%w: %s", ErrUnknownCommand, command)
	}
	c := jsonschema.NewCompiler()
	c.Draft = jsonschema.Draft2020
	url := "qmp:///" + command
	if err := c.AddResource(url, bytes.NewReader(text)); err != nil {
		return nil, fmt.Errorf("schema of %s: %w", command, err)
	}
	s, err := c.Compile(url)
	if err != nil {
		return nil, fmt.Errorf("schema of %s: %w", command, err)
	}
	schemas[command] = s
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
