// Package vhostuser exports disks to virtual machines over vhost-user: a front end, a process like
// QEMU, shares the memory of its guest with the daemon and tells where in it the queues of a
// virtio-blk device are. Requests are then seen, carried out and answered there, without the front
// end.
//
// # Life of a front end
//
//	accept -> messages: features, memory, rings ... --hang-up, a wrong message--> rings stop
//	              |   ^                                                               |
//	              v   |                                   requests end -> memory goes -> next one
//	        rings run, are stopped
//
// There is one at a time; the next one waits in the backlog of the socket.
//
// # Parts
//
//	server    the socket; what of the disk outlives a front end (device)
//	front     a connection and the device as it was set up: belongs to the message loop
//	channel   messages and their descriptors
//	memory    the guest's memory, mapped; a new table for each change
//	ring      a virtqueue and the goroutine that serves it, in line where nothing waits
//	workers   goroutines for requests that wait
//
// A request goes from the ring to the node and back in one goroutine: the ring's, or if the node
// would wait a worker's. Its data are not copied: the pages of the guest are what the node reads
// into or writes from. While the gate is closed, or an error has stopped the export, requests stay
// in the ring.
//
// # Limits
//
// Per front end: 64 workers and 64 requests that wait for one, beyond which requests stay in their
// rings; 509 regions of memory; 256 queues.
//
// # Locks
//
//	ring.mu > dirtyLog.mu; workers.mu, backChannel.mu, server.mu
//
// All others are leaves. No lock is held while a node is called.
//
// Source: QEMU, docs/interop/vhost-user.rst; virtio 1.2, 5.2.
package vhostuser
