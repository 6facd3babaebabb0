// Package qcow2 is the driver of the qcow2 image format.
//
// # Parts
//
// layout (pure) knows the bytes. image is one open image: the tables in memory, the caches
// of L2 slices and refcount blocks, the allocator, and the data path. driver connects an
// image to the graph. Create makes images by the same code that writes them.
//
// # Locks
//
// image.mu guards all metadata in memory. It is held across metadata I/O that a request
// needs to go on, never across guest data I/O and not across the barriers of a flush. The
// order is resizing > mu; both are driver locks in the order of package graph.
//
// # What is written when
//
// Guest data go to the file at once; metadata stay in the caches until a flush, a full
// cache, or close. One flush writes, with a barrier (a flush of the file) after each group
// that a later group depends on:
//
//	refcount blocks -> refcount table -> | data so far | -> L2 slices -> L1 entries
//
// so that nothing on disk ever refers to a cluster whose refcount or content is not there.
// L2 slices are written from copies made together with the refcount blocks, so requests go
// on while the barriers run. Refcounts that go down do so only after the reference has gone
// from the disk, hence refcount blocks may be written at any time and a freed cluster
// cannot be used for other data while a crash could bring the old reference back. With
// lazy refcounts the dirty bit takes the place of the first group.
//
// # Clusters that are being replaced
//
//	allocated (refcount 1, in flight) --data written--> linked (L2 entry) --replaced or
//	discarded--> pending (reference gone in memory) --flush--> limbo (gone on disk) --all
//	requests and leases that began before have ended--> punched, refcount down, free
//
// Requests and leases hold the epoch in which they looked up their clusters; a free waits
// for all epochs up to its own.
package qcow2
