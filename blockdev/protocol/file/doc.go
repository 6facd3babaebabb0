// Package file holds the drivers "file" (a regular file) and "host_device" (a block or character
// device): everything that ends in a file descriptor of this host.
//
// # Life of the descriptor
//
//	open ----> handle (refs: 1 driver + requests + mapping leases) ----> last reference: close
//	             ^
//	             | PermCommit swaps it where auto-read-only changes between reading and writing
//
// Requests take the current handle by an atomic pointer and a count, so a swap needs no drain. All
// lock bytes of a node are on its current handle; before a swap they are copied to the new one
// without probing (a second descriptor of the same process would see the first as a stranger), then
// the old one is unlocked.
//
// # Waiting
//
// A request with NoWait is answered in line only where the kernel is known not to wait:
//
//   - memory file systems (tmpfs, ramfs): plain calls for everything;
//   - buffered reads: preadv2(RWF_NOWAIT), if the file takes the flag and all bytes are cached;
//   - buffered overwrites (inside the present end of the file, no FUA): pwritev2(RWF_NOWAIT) where
//     the file takes it; elsewhere a plain write, if the last 16 writes to this node each took at
//     most 500 µs, it is at most 128 KiB long and fewer than 4 others are in it;
//   - block-status that the one cached data extent answers, and Map.
//
// All else, O_DIRECT included, returns blk.ErrWouldBlock and comes back from a worker. Every
// blocking call holds a thread, so at most 64 of a node are in the kernel at once; more wait for a
// place, or for the end of their root.
//
// With aio=native and aio=io_uring a worker's reads and writes (with io_uring its flushes, too) go
// through an engine of the node: io_submit or io_uring. The caller is parked until the kernel
// signals an eventfd, which Go's poller watches, so no thread is held; up to 128 requests of a node
// are under way, and those that arrive while one caller submits go out together, at most
// aio-max-batch at a time. On memory file systems there is nothing to wait for and no engine.
//
// # Write-behind
//
// Whenever jobs have written 8 MiB to a file through the page cache its write-back is started
// (behind.go), so that the medium works while a job copies and not only in the flush at its end.
//
// # Locks
//
// File locks keep qblockd and QEMU (and two nodes of one daemon) out of each other's way, in QEMU's
// protocol: for permission bit i a shared lock on byte 100+i says "I use it", on byte 200+i "I do
// not let others use it". Shared locks never collide among each other; who has taken his asks with
// F_OFD_GETLK whether somebody stands on the opposite bytes. See lockSet.
//
// Lock order: disk.permSlot > nothing; no lock is held across I/O.
package file
