// Package nbd serves block devices over the NBD protocol: fixed newstyle handshake, simple
// and structured replies, extended headers, the metadata contexts base:allocation,
// qemu:allocation-depth and qemu:dirty-bitmap.
// Type is what the table of exports knows of it; the Server behind it knows no graph: an export's
// data is a Device, which Type makes of a root.
//
// # Life of a connection
//
//	accept -> handshake --GO, EXPORT_NAME--> transmission --DISC, EOF, error-> requests end -> closed
//	              |                              |
//	              +-- deadline, ABORT, error     +-- Export.Shutdown, Server.Close: killed
//
// # Parts of a connection
//
//	conn      the socket and its life; what all parts share
//	session   what was negotiated: constant, no lock     (negotiation makes it)
//	reader    requests from the socket; serves in line what needs no waiting (blk.Req.NoWait)
//	inline    clients with one request at a time: the reader serves what waits, too
//	workers   goroutines for requests that wait; the bounds on what is under way
//	sender    replies to the socket; mapped reads and their leases
//
// The reader takes many requests with one system call. Replies that it makes are gathered and sent
// with one system call before it waits for more requests. So are those of workers that can go on at
// the same time. A request passes the device's gate once, and never holds that pass while it waits
// for the client: data is read first, then the pass ends, then it is sent. So a client that reads
// nothing holds up no drain. One without data that is about very much is done in pieces, each with
// a pass of its own.
//
// A read of a device that would have to wait to tell where holes are (another server would be
// asked) is read as a whole, and looked at for zeroes.
//
// # Mapped reads
//
// Reads of at least mapMin bytes whose range the device maps to host files go to a unix
// socket by sendfile. The pass ends after mapping; the mapping's lease is kept until the
// socket's send queue (SIOCOUTQ) shows that the peer has taken the bytes, because until
// then the queue refers to live pages of the file. Other sockets get copies: on the way to
// a peer on the same host (loopback, a pair of virtual interfaces) the pages would still be
// live in the peer's receive queue, which nothing shows. Since an error may turn up when
// the head of the data is sent already, the last chunk of a mapped reply is an empty one;
// on an error the data is filled up with zeroes and an error chunk with its offset ends the
// reply. Without structured replies the connection is dropped instead.
//
// # TLS
//
// A server with credentials does nothing for a client but tell it to ask for TLS, until that has
// begun and the client has proved who it is: no name of an export and no byte of data go in the
// clear. Then all but mapped reads is as without.
//
// # Limits
//
// Per connection: one request at most 32 MiB; Options.Inflight requests and InflightBytes of their
// data between having been read and having been answered, beyond which the connection is not read
// (one request always may); maxWorkers goroutines. A handshake has to be over within
// Options.Handshake. Option data are bounded by what their option can use. The number of
// connections is bounded by Options.MaxConns, others wait in the socket's backlog.
//
// # Locks
//
//	sender.mu > sender.queueMu, workers.mu
//
// sender.mu is held while the connection waits for its client to take replies, hence never waited
// for with another lock held. All others are leaves: Type.mu, Server.mu, Export.mu. No lock is held
// while a device is called.
package nbd
