package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"qblockd/schema"
)

// runSchema prints the JSON Schema of each command named in args; without any, one
// object that holds those of all commands by name.
func runSchema(args []string, out io.Writer) error {
	for _, command := range args {
		text := schema.JSONSchema(command)
		if text == nil {
			return fmt.Errorf("there is no command '%s'; 'qblockctl schema' shows all", command)
		}
		if _, err := out.Write(text); err != nil {
			return err
		}
	}
	if len(args) > 0 {
		return nil
	}
	all := make(map[string]json.RawMessage)
	for _, command := range schema.Commands() {
		all[command] = schema.JSONSchema(command)
	}
	text, err := json.Marshal(all) // sorts by name
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, text, "", "  "); err != nil {
		return err
	}
	b.WriteByte('\n')
	_, err = out.Write(b.Bytes())
	return err
}
