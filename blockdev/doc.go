// Package blockdev turns options into opened nodes and answers what the nodes are: blockdev-add,
// -del and -reopen, what image headers name, file names, new images, and the queries. It knows no
// driver: what there is to know of them their descriptions say (package driver).
//
// # Opening
//
//	options --plan--> tree of generic options, checked; no side effects
//	        --reserve--> hidden nodes: all names that the options give are taken
//	        --open, bottom up--> for each node: its children are opened and attached, then the driver
//	                is opened, then its backing chain, from the options or from the image's header
//	        --publish--> the whole tree becomes visible at once
//
// Nothing is locked while a driver opens; a failure anywhere, or the end of the context, discards
// the hidden nodes and with them names, claims, file locks and descriptors.
//
// What an image names (a backing file) passes through one gate, image_name.go, and a Policy. What
// is written into headers in turn leaves out filters (Manager.HeaderName): it can be read again by
// whoever has the files.
//
// # Names of nodes
//
// The file name of a node is the plain name of its file where that alone would open the same node,
// else "json:" and the options that matter. It depends on the nodes below; each node's name is kept
// with the generation of the tree it was made from, shares the parts below it, and is cut off at
// 4095 bytes as in QEMU, so that chains cost linear time.
//
// # Queries
//
// What a node shows is encoded once and kept until it changes; answers are spliced from these
// pieces. Nothing here does I/O while it holds a lock; allocated sizes are asked for by workers
// that a query waits for no longer than 20 ms.
package blockdev
