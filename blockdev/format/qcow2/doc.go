// Package qcow2 is the driver of the qcow2 image format.
//
// # Parts
//
// layout (pure) knows the bytes. An open image is in layers. Each embeds the one below it, which it
// may call, and the fields that it adds are its own:
//
//	Driver      connects an image to the graph
//	image       opening, closing, reopening, resizing, creating
//	requests    reads, writes, status, mapping, copying of the guest disk
//	discarder   zeroes and discards of the guest disk
//	bitmaps     persistent bitmaps: their directory, their marks
//	snapshots   internal snapshots (bitmaps do not use them: their order is arbitrary)
//	flusher     writes what has changed; check and repair
//	tables      L1 and L2 tables: lookup, slices in the cache
//	allocator   gives out and takes back clusters; quarantine
//	surveyor    counts what the image refers to, before the first write
//	refcounts   refcount table and blocks, the latter in a cache
//	imageFile   the file, its header, the places of metadata and the checks before they are written
//
// What a layer needs of those above it goes through an interface: references (what L1 tables,
// snapshots and bitmaps refer to, for a survey) and bitmapKeeper (the dirty bitmaps of the node).
// Create makes images by the same code that writes them.
//
// # Locks
//
// imageFile.mu guards all metadata in memory. It is held across metadata I/O that a request needs
// to go on, never across guest data I/O and not across the barriers of a flush. The order is
// resizing > marking > mu; all are driver locks in the order of package graph.
//
// # What is written when
//
// Guest data go to the file at once; metadata stay in the caches until a flush, a full cache, or
// close. One flush writes, with a barrier (a flush of the file) after each group that a later group
// depends on:
//
//	refcount blocks -> refcount table -> | data so far | -> L2 slices -> L1 entries
//
// so that nothing on disk ever refers to a cluster whose refcount or content is not there. L2
// slices are written from copies made together with the refcount blocks, so requests go on while
// the barriers run. Refcounts that go down do so only after the reference has gone from the disk,
// hence refcount blocks may be written at any time and a freed cluster cannot be used for other
// data while a crash could bring the old reference back. With lazy refcounts the dirty bit takes
// the place of the first group.
//
// # Clusters that are being replaced
//
//	allocated (refcount 1, in flight) --data written--> linked (L2 entry) --replaced or
//	discarded--> pending (reference gone in memory) --flush--> limbo (gone on disk) --all
//	requests and leases that began before have ended--> punched, refcount down, free
//
// Requests and leases hold the epoch in which they looked up their clusters; a free waits for all
// epochs up to its own. Who finds no space makes a flush and tries again, if something is only kept
// back.
//
// # Data in another file
//
// Where the header says so, guest data lie in a file of their own, each cluster where it is on the
// disk. They have no refcounts there: nothing is allocated but metadata, nothing of them is in
// quarantine, and what is discarded is punched at once, before anything new is written there. That
// file is flushed before L2 slices are written. If it shows the disk by itself (data-file-raw),
// zeroes and discards are made in it and the tables stay as they are.
//
// # Encrypted images
//
// Guest data are encrypted sector by sector on their way to the file and back (crypt.go): in images
// of the method LUKS with the number of a sector in the file, in those of AES with that on the
// disk. Metadata and compressed clusters are not, so nothing is compressed. Whatever was never
// written, or was punched, reads as noise: what is preallocated gets the zero flag, nothing relies
// on a file that reads as zeroes, and what is discarded in another file, or keeps its place, is not
// punched. Keys are in memory of their own from opening to closing. The header with the keys
// (package crypto/luks) is metadata like others for whoever counts.
//
// # Images that others made
//
// Refcounts, flags and tables may say anything. Before the first write a survey begins to count all
// that an image refers to (survey.go); images that were not closed are counted as a whole when they
// are opened for writing (check.go). So
//
//   - a cluster is given out only if its refcount is 0 and nothing in the image refers to it: no
//     table of the active disk, of a snapshot or of a bitmap. Until all tables are known it must
//     also lie behind the end that the file had, unless there is no other space;
//   - a cluster is punched, and its refcount goes to 0, only if as many references are counted as
//     there are. A refcount that is too low is raised first;
//   - what lies in a cluster that someone takes for his own although others refer to it (two
//     entries with the copied flag, tables over tables or over data), or that no refcount block
//     counts, is not written to, freed, punched or cut off with the end of the file: who tries ends
//     the use of the image, which is marked corrupt. It can be read until then;
//   - tables that are written in place lie in the file and over nothing else, or nothing is written
//     at all.
//
// What one survey may take in memory is bounded (maxSurvey). Larger images, and those with a table
// that cannot be read, are used without: new clusters come from behind the end of the file as it
// was found, what is freed must have a refcount, and overlaps with metadata are found as the option
// overlap-check says.
//
// What is overwritten in place before the survey of a large image is over is known to lie in no
// metadata of any kind, and in no data of the tables that were looked at by then, its own among
// them. Each such write makes the next step, too, so that it does not take many: about 140 for 1
// TiB of data in clusters of the default size.
//
// A repair of an image that was not closed changes refcounts, copied flags and the refcount table,
// and drops what points beyond the end of the file. It refuses images whose header, L1 table,
// refcount table, table of snapshots or L2 tables lie over anything. It takes time in proportion to
// the tables there are, at most maxTally in memory, ends with its client, and is logged. One that
// somebody has asked for (the command x-qblockd-check) also puts right, before that, what the
// tables refer to (scrub.go).
package qcow2
