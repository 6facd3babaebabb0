// Package events carries events from where they happen to every client that listens.
package events

// Event is something that happened; the generated event types of schema/types are Events.
type Event interface {
	// EventName is the QAPI name, e.g. "JOB_STATUS_CHANGE".
	EventName() string
	// AppendJSON appends the encoded "data" object, or nothing when the event has no data.
	AppendJSON(b []byte) []byte
}

// Sink takes events. Emit never blocks and never calls back; the order of Emit is the
// order in every QMP session.
type Sink interface{ Emit(e Event) }
