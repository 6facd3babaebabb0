// Package nbd is the driver nbd: a disk on an NBD server.
//
//	dial.go       the connection to the server
//	handshake.go  what comes before the first request: options, what the export is like
//	conn.go       a connection: requests under way, who sends, who waits
//	turn.go       who reads the replies
//	reply.go      what the server answers
//	disk.go       the driver: opening, properties, the end
//	io.go         requests of the graph as requests of the protocol
//	mapped.go     ranges of files that the kernel sends
//	link.go       which connection is in use, and what happens when it is lost
//	several.go    more than one connection
//	names.go      file names
//
// # Connections
//
// Up to 64 requests are under way on a connection, matched by their cookies. Who issues a request
// sends it, and with it those that others have queued meanwhile, in one system call; where others
// are under way it lets those that can run queue theirs first. One goroutine reads the replies,
// data straight into the buffers of the requests. When many requests were alone on the connection
// the next one that is reads its reply itself, since to be woken takes longer than to read; between
// such requests nobody reads, so the end of the connection is noticed at the next request, or
// within a second.
//
//	connected --(connection lost)--> waiting --(reconnect-delay)--> offline
//	    ^                               |                              |
//	    +-------------------------------+------(connected again)-------+
//
// Requests of a connection that is lost are sent again by the next one while the driver is waiting:
// up to reconnect-delay. Offline, or without a reconnect-delay, they fail with EIO, and each tries
// to bring the server back without waiting for that. A server that breaks the protocol is given up
// for good (state broken): what it says next could be taken for the answer to another request. So
// is one that comes back with another size, or with less than it could do before, but that is asked
// again.
//
// What was acknowledged on a connection that is lost, but not flushed, is as safe as the server
// makes it: one that was restarted may have forgotten it, and the next flush succeeds all the same.
// QEMU does likewise; the log says whether there was something unflushed. A request that is sent
// again may be executed twice. What the kernel has not sent of a TCP connection that is given up is
// dropped. A server that goes on with what it got by a connection that has ended may execute it
// once more after a later write of the same range.
//
// Attempts to connect again begin at once, then after 100 ms, and pauses double up to 16 s.
//
// # Several connections
//
// To a server that says that it takes several (CAN_MULTI_CONN) up to x-qblockd-connections are
// made: the first one as ever, the others in the background. A request goes where the fewest are
// under way; one flush counts for what was acknowledged on any of them. All of them are one as
// above: when one is lost, or breaks the protocol, so are the others, and connecting again begins
// with the first one. Else a flush could go to another server than writes that were acknowledged by
// one that is about to end. But one that has never answered is lost alone, and its requests are
// sent again by the others; it is done without until the server is connected to again.
//
// # Extended headers
//
// They are spoken with a server that has them. Then zeroing, discarding and questions about the
// block status are one request however long the range is. A server that comes back without them is
// not taken.
//
// CMD_CACHE is not sent, nor is it by QEMU (7.2, 10.0): a prefetch of what an export has is over
// when its block status is known, and what copy-on-read wants it reads.
//
// # Pages of files
//
// What jobs copy from files on this machine to a server is sent by the kernel, from its cache,
// where it is in full. Until the server has taken the bytes they are the file's: a guest's write in
// between may be among them, or not, as with any copy that is under way at the time, and the
// request ends with the server's answer. Of a server that is lost before its answer, and goes on
// with what it was sent, that is true for longer: so a point in time is never copied in this way
// (copy-before-write), and a mirror copies again what was written.
//
// # TLS
//
// With tls-creds nothing but the request for TLS goes in the clear, also when the driver connects
// again: a server that does not do it is not used. Its certificate must be for tls-hostname, or the
// host that was connected to.
//
// # What a bad server costs
//
// The handshake has 10 s. No reply may be longer than what was asked for, text no longer than the
// protocol allows, and chunks that overlap, or errors without end, break the protocol: memory and
// time are bounded. Where a server answers nothing and moves less than 64 KiB in 5 s while a
// request is waited for by a drain, by the end of the node or by a root that is torn down, the
// connection is given up. While nodes are drained no request waits for a server to come back.
//
// A server that comes back, answers nothing and is lost again is as one that has not come back:
// the time that requests wait goes on, and pauses between attempts grow. A request that ten
// connections did not survive fails with EIO: it may be what kills the server.
//
// Lock order: disk.mu > conn.mu.
package nbd
