// Package virtio is the device's side of virtio as bytes in memory: a guest's memory, split and
// packed virtqueues, the area that survives a device's crash, and the requests of virtio-blk. It
// opens, maps and waits for nothing: who serves a transport maps memory, waits for kicks, moves
// data and notifies. Sources: Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7, 2.8 and 5.2;
// QEMU's docs/interop/vhost-user.rst for addresses and for what is in flight.
//
// # The way of a request
//
//	Request.Pop -> (data to and from Request.Data) -> Request.Finish -> Queue.Publish -> notify
//
// Pop takes a chain of descriptors from the ring and reads the request's header. What is finished
// is staged; Publish shows all of it to the driver at once and tells whether the driver wants to be
// notified. Nothing is copied but headers: data are slices of the guest's memory. A pooled Request
// keeps its slices, so nothing is allocated for one either.
//
// # A guest is hostile
//
// Whatever is in the guest's memory may change while it is looked at: each descriptor, index and
// header is read once and checked after that. Work for one Pop is bounded by the size of the queue.
// A ring that makes no sense breaks the queue: every later call returns the error that says what
// was wrong, until the device is reset and a new Queue made. Memory may vanish (the file below a
// mapping is truncated): a fault is an error of the same kind, see Guard.
//
// # Who may call
//
// A Queue is used by one goroutine at a time; so is a Request. Memory may be used by all.
// Indices and flags that the driver changes at the same time are read and written by sync/atomic,
// in aligned words of 32 bits, for there are no smaller ones: an index is loaded before what it
// promises, and stored after.
package virtio
