// Package hostile hunts for images that harm the daemon, or what it does not ask to be harmed.
//
//	Spec --NewBase--> a sound image --Damages--> what can be done to it --NewCases--> Case n: a base with one damage, or several
//	                                                                                    |
//	                            Run on a real daemon that serves many cases <-----------'
//
// A base knows each of its structures and fields. Each field is set to each value that is of interest for what it means:
// nothing, itself, each other structure, the end of the file and what lies behind it, the largest, unaligned ones, flags
// turned over; the file ends in the middle of each structure. What a case does to its image (open for reading, for writing,
// as the backing file of an overlay; query, export, read, write, zero, trim, flush, resize, snapshots, bitmaps, jobs, close)
// is drawn from its number and the seed, so a case is repeated by these two.
//
// Afterwards: the daemon is alive, has answered each command and request before a deadline and kept to a budget of
// memory; a client of another disk has been served all the time; no file but the image has changed, and not even the
// image by opening it for reading; what was acknowledged reads back, in the same opening and in the next one, and so does
// what was there before and not written to. Requests may fail.
//
// What the damage itself makes of the disk is told by Inspect, a second, simple reader of the format: where data lie in a
// table, nothing is expected of them, as what the table says changes. Data that lie in one place, or are not counted, have to
// stay as they are until they are written to, or not to be shown.
package hostile
