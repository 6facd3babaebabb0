// Package fuse is the export type "fuse": a node appears as a regular file, over a regular file,
// served to the kernel over /dev/fuse. The protocol is ours to speak; no library is linked.
//
// # Life of an export
//
//	Check: the mountpoint --> Serve: mounted --> INIT --> served --Shutdown--> aborted, unmounted
//	                                                                              |
//	                                             Done <-- last request ended <----+
//
// Unmounting aborts the connection first: programs that have the file open get errors at once,
// nobody waits for them, and the mount is gone whatever they do. A write(2) of theirs was
// acknowledged or was not, as with any file.
//
// # Requests
//
// A few goroutines read requests from /dev/fuse, and each serves what it has read: no request is
// handed from one goroutine to another. What needs no waiting is served at once (blk.Req.NoWait);
// before a reader waits for storage, the gate or a worker of a group it sees to it that another one
// reads on, up to maxReaders. Readers beyond spareReaders end when they have nothing to do.
//
// A request is read into a reader's buffer so that the data of a write begin at a page: they go to
// the node from there, also with O_DIRECT. Data of a read are put where the reply needs them. Large
// reads of what lies in files of the host go from there to the kernel by splice, see pipe.
//
// Attributes are answered without the gate, from what is known: as long as a reader is left, stat
// waits for no storage and no drain, also not for one that a command of ours has begun before it
// looks at a file behind a mount of ours.
//
// A daemon whose nodes have a file open that it serves itself can be killed while they do not use
// it. With requests of theirs under way the kernel keeps the dead process until somebody aborts the
// connection (umount -f): those threads wait for an answer, and the connection is closed last.
//
// # Caches
//
// The kernel keeps attributes for a second and pages of the file for as long as the attributes say
// that it has not changed; as the time of change is always now, that is about a second, too. What
// others do to the node (NBD, a job) is seen after that time. Opening the file drops all pages, and
// what is opened with O_DIRECT has none.
//
// # Locks
//
//	Type.mu, export.mu    leaves
package fuse
