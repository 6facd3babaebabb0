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

// EmitAll sends events of one moment, so that a client that is told of the first has the others,
// too, where s can do that.
func EmitAll(s Sink, l ...Event) {
	if b, ok := s.(interface{ EmitAll(l ...Event) }); ok {
		b.EmitAll(l...)
		return
	}
	for _, e := range l {
		s.Emit(e)
	}
}
