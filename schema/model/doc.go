// Package model is a checked QAPI schema in memory: definitions with all names
// resolved, and the two renderings that clients see, introspection (the reply to
// query-qmp-schema) and JSON Schema. It is used when code is generated and by
// tests; the daemon carries only what came out.
//
// The way of a schema:
//
//	text --Scan--> []Expr --Build--> *Schema (resolved, checked)
//	                                  |-> Introspect, Commands   bytes on the wire
//	                                  `-> JSONSchema             one document a command
//
// Scan is deliberately independent of the parser that cmd/qapigen uses: the
// generator compares both readings expression by expression, which proves that
// its parser took in the whole text.
//
// What QAPI offers and our schema does not use (conditions, pragmas, generated
// documentation markup) is refused instead of ignored.
package model
