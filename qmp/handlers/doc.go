// Package handlers holds the bodies of the QMP commands, a type for each module of the schema. Each
// decodes nothing and decides nothing: it turns the arguments, already checked, into one call of
// the domain and that call's result into the reply. The types are wired up in cmd/qblockd.
package handlers
