// Command agent is the first and only process of the guest in tests/guest. It loads the kernel's
// drivers, formats and mounts a disk, writes to it, checks each byte that it reads, and says by its
// second serial line what it has seen; the test at the other end of the line says what to do.
//
//	main.go     the first process of a machine, and the line to the test
//	disk.go     the disk: partitions, file system, what the kernel is asked about it
//	pages.go    writers of pages of the bare second partition
//	files.go    writers of files of the first one
//	meter.go    what has been done, and how long it took
package main
