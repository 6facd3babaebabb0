// Package storm lets several clients at once do everything to one daemon that changes something, on
// few nodes and few names, while guests write; and then finds out whether what they were told is
// true.
//
//	clients   random commands, all that the schema has, steps of transactions that fail among them;
//	          some leave without waiting for the answer
//	guests    NBD connections, each with blocks of its own: it knows what each may hold, and looks
//	          all the time
//	d0        a guest's disk whose graph changes: overlays, streams, commits, mirrors, backups
//	d1        bitmaps, internal snapshots and reopen, nothing that writes to it
//	d2        resize and internal snapshots
//	d5        resize, and overlays one on the other, below a node that shows the top
//	d6        becomes larger, with overlays that are committed and streamed, below a filter
//	d3        a guest's disk whose bitmap has recorded from the beginning
//	others    anything goes
//
// After each storm all jobs are ended, and: every snapshot, bitmap, size, node and export is what
// some order of the acknowledged commands leads to that agrees with when they were sent and
// answered (linear.go decides that, object by object; of a command whose client has left nobody
// knows whether it was done); guests read what they wrote; the bitmap has what was written; the
// daemon ends in good order, without a data race or a panic in its log; qemu-img finds nothing
// wrong with the images, leaks neither: nobody was killed. A run that fails leaves its log of
// commands behind and says its seed. (Which command comes first is up to the scheduler; the seed
// only makes each client want the same.)
//
//	make storm STORM_TIME=30m CLIENTS=6 SEED=1          SUBJECT=another binary than this tree's
package storm
