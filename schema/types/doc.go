// Package types holds the Go types of the QMP interface: structs, enums, unions,
// events, decoders, encoders and handler interfaces, generated from schema/qapi by
// cmd/qapigen. Only this file and support.go are written by hand.
package types
