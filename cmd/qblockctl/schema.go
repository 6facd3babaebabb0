package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"qblockd/schema"
)

func (a *app) schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema [COMMAND...]",
		Short: "print the JSON Schema of QMP commands",
		Long: "Prints the JSON Schema of the arguments of each command named; of all commands, as one object, if none is. It needs no\n" +
			"daemon: these are the commands of the qblockd that came with this qblockctl.",
		ValidArgs: schema.Commands(),
		RunE:      func(_ *cobra.Command, args []string) error { return runSchema(args, a.out) },
	}
}

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
	return printJSON(out, text)
}
