// Package meta does random things to a block graph in this process and compares what guests read
// with plain bytes: I/O, nodes coming and going, overlays, live snapshots, resizes, reopens,
// exports, jobs of all kinds in all ways of ending (stream, commit and mirror with their pivots,
// backups, incremental ones too), dirty bitmaps, transactions that fail, over images of all shapes.
//
//	seed --Generate--> operations --Run--> nil, or what went wrong
//	                        ^-------Reduce-------'
//
// An operation names a slot (an image that is there or not) and carries random numbers; what it
// does follows from these and from the state that the operations before it made. One that makes no
// sense then does nothing, so any subsequence of a history is a history: a failing one is reduced
// by leaving operations out.
//
// The content of an image is what a guest sees of it, backing files included. Nothing writes to an
// image that others back on, so that it never changes but by writes to itself, and by commits,
// which nobody else may look at meanwhile. What a job has left that was cancelled, or failed, is
// read before the image is used again. The files that jobs copy to may fail once; a job that says
// it succeeded must have copied everything all the same. A bitmap must have whatever is not as it
// was when it was clean.
package meta
