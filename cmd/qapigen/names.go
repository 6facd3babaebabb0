package main

import (
	"strings"

	"qblockd/schema/model"
)

// camel makes a Go name of a QAPI name: words start at hyphens, underscores, dots
// and at the start, each gets a capital, "id" becomes ID. Capitals inside words stay.
func camel(name string) string {
	var b strings.Builder
	for _, w := range strings.FieldsFunc(name, func(r rune) bool { return strings.ContainsRune("-_. ", r) }) {
		if w == "id" {
			b.WriteString("ID")
			continue
		}
		b.WriteString(strings.ToUpper(w[:1]) + w[1:])
	}
	return b.String()
}

// eventName is the Go type of an event: BLOCK_JOB_READY -> BlockJobReadyEvent.
func eventName(name string) string { return camel(strings.ToLower(name)) + "Event" }

// typeName is the Go type of a defined QAPI type.
func typeName(t *model.Type) string {
	if t.Implicit {
		owner := strings.TrimSuffix(strings.TrimPrefix(t.Name, "q_obj_"), "-arg")
		if owner == strings.ToUpper(owner) {
			return eventName(owner)
		}
		return camel(owner) + "Args"
	}
	return t.Name
}

// scalars are the Go types of builtins and the functions that decode them.
var scalars = map[string]struct{ goType, visit string }{
	"str": {"string", "visitStr"}, "bool": {"bool", "visitBool"}, "int": {"int64", "visitInt64"},
	"int8": {"int8", "visitInt8"}, "int16": {"int16", "visitInt16"}, "int32": {"int32", "visitInt32"}, "int64": {"int64", "visitInt64"},
	"uint8": {"uint8", "visitUint8"}, "uint16": {"uint16", "visitUint16"}, "uint32": {"uint32", "visitUint32"},
	"uint64": {"uint64", "visitUint64"}, "size": {"uint64", "visitSize"},
	"number": {"float64", "visitNumber"}, "any": {"value.Value", "visitAny"}, "null": {"bool", "visitNull"},
}

// goType is the Go type of a value that is always there.
func goType(t *model.Type) string {
	switch t.Kind {
	case model.Builtin:
		return scalars[t.Name].goType
	case model.Array:
		return "[]" + elemType(t.Elem)
	}
	return typeName(t)
}

// elemType is the Go type of list elements and of what commands return.
func elemType(t *model.Type) string {
	if t.Kind == model.Object || t.Kind == model.Alternate {
		return "*" + goType(t)
	}
	return goType(t)
}

// fieldType is the Go type of a member.
func fieldType(m *model.Member) string {
	if !m.Optional || m.Type.Kind == model.Array || goType(m.Type) == "value.Value" {
		return goType(m.Type)
	}
	return "*" + goType(m.Type)
}

// visitor is the function that decodes a type.
func visitor(t *model.Type) string {
	if t.Kind == model.Builtin {
		return scalars[t.Name].visit
	}
	return "visit" + typeName(t)
}

// module is the QAPI module a schema file holds.
func module(file string) string { return strings.TrimSuffix(file, ".json") }

// handlerModule is the handler interface a command belongs to: that of its module,
// save where one module has several owners in our code.
func handlerModule(c *model.Command) string {
	switch c.Name {
	case "block-stream", "blockdev-backup", "drive-backup", "blockdev-mirror", "drive-mirror",
		"block-commit", "change-backing-file", "query-block-jobs", "x-qblockd-rebase":
		return "block-job"
	case "blockdev-create", "x-blockdev-amend", "x-qblockd-check":
		return "block-create"
	}
	if strings.HasPrefix(c.Name, "block-job-") {
		return "block-job"
	}
	return module(c.File)
}

// rawReplies are the commands whose handlers return bytes that are already encoded.
var rawReplies = map[string]bool{
	"query-named-block-nodes": true, "query-block": true, "query-blockstats": true,
	"query-qmp-schema": true, "query-commands": true,
}

// optionTypes are decoded although no command takes them: the command line does.
var optionTypes = []string{"NbdServerOptions", "MonitorOptions"}
