// Package qmp speaks the QEMU Machine Protocol: it cuts a client's bytes into requests, checks
// and executes them, and sends replies and events back.
//
//	client --bytes--> Session --request--> Dispatcher --> handler (types.HandlerFunc)
//	   ^                 |  ^
//	   +---out queue-----+  +---- events.Bus
//
// A Session is one client of a Monitor. It starts with the greeting; qmp_capabilities ends
// the negotiation and lets all other commands, and the events, through. In-band commands of a
// session are executed one after the other; sessions never wait for one another.
//
// # Output
//
// Replies and events of a session go through one queue, in the order in which they came about.
// The queue is written when the requests that have arrived are answered, when a batch of
// answers has become large, or when a command takes longer than flushDelay. The session's
// own goroutine writes, but without ever waiting for the client: what the client does not
// take at once is left to a second goroutine, which lives until the queue is empty.
//
// A client that does not read costs the others nothing and is bounded: while more than
// Limits.HoldInput bytes wait unsent, the session reads and executes nothing; when more than
// Limits.Unsent wait (events go on coming), it is disconnected. One reply may exceed that.
//
// # End of a client
//
// When a client shuts down its sending side, what it sent is still executed and answered,
// then the connection is closed. When it is gone for good (its socket hung up, or a write
// failed) the context of its commands is cancelled; those not begun are not executed.
//
// # Out of band
//
// A client that enabled "oob" has its in-band requests queued, maxQueued at most, while the
// session goes on reading, so that an exec-oob request overtakes them.
package qmp
