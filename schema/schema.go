// Package schema is the QMP interface as data: the QAPI files it is defined by, and what
// cmd/qapigen makes of them, embedded as it is sent: the replies to query-qmp-schema and
// query-commands, and a JSON Schema for the arguments of each command.
//
// The parts of the schema's machinery:
//
//	schema/qapi     the definitions, in QAPI syntax
//	schema/types    generated: Go types, decoders, encoders, handler interfaces
//	schema/model    parses, resolves, checks; used when generating
//	schema/check    validates arguments against the JSON Schemas; used by tests
//	schema/value    JSON values
//
// What clients send is validated by the decoders in schema/types, which alone word errors.
package schema

import (
	"embed"
	"io/fs"
	"slices"
)

//go:generate go run qblockd/cmd/qapigen -schema .

//go:embed qapi/*.json
var qapi embed.FS

//go:embed gen/jsonschema/*.json
var jsonSchemas embed.FS

//go:embed gen/query-qmp-schema.json
var queryQMPSchema []byte

//go:embed gen/query-commands.json
var queryCommands []byte

// QAPI returns the definitions: *.json in QAPI syntax; qapi-schema.json includes the others.
func QAPI() fs.FS {
	sub, err := fs.Sub(qapi, "qapi")
	if err != nil {
		panic(err) // the name is valid
	}
	return sub
}

// QueryQMPSchema returns the reply to query-qmp-schema in the form it is sent in. The
// bytes are shared and must not be changed.
func QueryQMPSchema() []byte { return queryQMPSchema }

// QueryCommands returns the reply to query-commands in the form it is sent in. The
// bytes are shared and must not be changed.
func QueryCommands() []byte { return queryCommands }

// JSONSchema returns the JSON Schema (draft 2020-12) of the arguments of a command,
// or nil if there is no such command.
func JSONSchema(command string) []byte {
	b, err := jsonSchemas.ReadFile("gen/jsonschema/" + command + ".json")
	if err != nil {
		return nil
	}
	return b
}

// Commands returns the names of all commands, sorted.
func Commands() []string {
	entries, err := jsonSchemas.ReadDir("gen/jsonschema")
	if err != nil {
		panic(err) // it is embedded
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()[:len(e.Name())-len(".json")]
	}
	slices.Sort(names) // the files are, but by names with an extension
	return names
}
