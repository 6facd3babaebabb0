// Package nbd serves block devices over the NBD protocol: fixed newstyle handshake, simple
// and structured replies, the metadata contexts base:allocation and qemu:allocation-depth.
// Type is what the table of exports knows of it; the Server behind it knows no graph: an export's
// data is a Device, which Type makes of a root.
//
// # Life of a connection
//
//	accept --> handshake --GO / EXPORT_NAME--> transmission --DISC, EOF, error--> requests end --> closed
//	              |                                 |
//	              +--- deadline, ABORT, error       +--- Export.Shutdown, Server.Close: killed, socket shut down
//
// One goroutine reads a connection's requests, many with one system call, and serves them
// itself while nothing has to be waited for (blk.Req.NoWait); what would wait goes to a
// worker. Replies made by the reader are gathered and sent with one system call before it
// waits for more requests. A request passes the device's gate once, and never holds that
// pass while it waits for the client: data is read first, then the pass ends, then it is
// sent. So a client that reads nothing holds up no drain.
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
// # Limits
//
// Per connection: one request at most 32 MiB; Options.Inflight requests and InflightBytes of their
// data between having been read and having been answered, beyond which the connection is
// not read (one request always may); maxWorkers goroutines. A handshake has to be over within Options.Handshake. Option data
// are bounded by what their option can use. The number of connections is bounded by
// Options.MaxConns, others wait in the socket's backlog.
//
// # Locks
//
// Type.mu is a leaf.
//
//	Server.mu > Export.mu > conn.sendMu > conn.mu
//
// sendMu is held while the connection waits for its client to take replies, hence never
// waited for with another lock held. No lock is held while a device is called.
package nbd
