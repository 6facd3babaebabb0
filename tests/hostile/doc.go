// Package hostile hunts for images that harm the daemon, or what it does not ask to be harmed.
//
//	Spec --NewBase--> a sound image --Damages--> what can be done to it
//	     --NewCases--> Case n: a base with one damage or several
//	     --Run--> on a real daemon that serves many cases
//
// A base knows each of its structures and fields. Each field is set to each value that is of
// interest for what it means: nothing, itself, each other structure, the end of the file and what
// lies behind it, the largest, unaligned ones, flags turned over; the file ends in the middle of
// each structure. What a case does to its image (open for reading, for writing, as the backing file
// of an overlay; query, export, read, write, zero, trim, flush, resize, snapshots, bitmaps, jobs,
// close) is drawn from its number and the seed, so a case is repeated by these two.
//
// Afterwards: the daemon is alive, has answered each command and request before a deadline and kept
// to a budget of memory; a client of another disk has been served all the time; no file but the
// image has changed, and not even the image by opening it for reading; what was acknowledged reads
// back, in the same opening and in the next one, and so does what was there before and not written
// to. Requests may fail.
//
// What the damage itself makes of the disk is told by Inspect, a second, simple reader of the
// format: where data lie in a table, nothing is expected of them, as what the table says changes.
// Data that lie in one place, or are not counted, have to stay as they are until they are written
// to, or not to be shown.
//
// # Faults of QEMU that were given numbers
//
// Those that the parts of QEMU which this daemon has a counterpart of had, and the tests that hold
// them here:
//
//	CVE-2008-0928  requests beyond the end of a disk               tests/hostile TestCVE_2008_0928
//	CVE-2008-2004  the format of a raw disk is guessed by content  blockdev TestCVE_2008_2004
//	CVE-2014-0142  fields that divide by zero, endless loops       tests/hostile TestCVE
//	CVE-2014-0143  sizes whose product does not fit                tests/hostile TestCVE
//	CVE-2014-0144  fields of the header that nobody checked        tests/hostile TestCVE
//	CVE-2014-0145  L1 tables of snapshots longer than the disk's   tests/hostile TestCVE
//	CVE-2014-0146  a failure after snapshots were read             tests/hostile TestCVE
//	CVE-2014-0147  numbers of free clusters that do not fit        tests/hostile TestCVE
//	CVE-2015-4106  work without bound, in small images             tests/hostile TestCVE
//	CVE-2017-9524  NBD clients that go away in the handshake       tests/load TestCVE_2024_7409
//	CVE-2020-10761 NBD export names of 4096 bytes                  tests/load TestCVE_2024_7409
//	CVE-2024-4467  files that an image names are opened when looked at blockdev TestCVE_2024_4467
//	CVE-2024-7409  the NBD server stops while clients negotiate    tests/load TestCVE_2024_7409
//
// CVE-2014-0148, -0222 and -0223 are of formats, CVE-2014-0150 is of a network card that are not
// here. (CVE-2015-4106 is of a device that is not here either; what stands there is the same kind:
// the guest makes the host work without end.)
package hostile
