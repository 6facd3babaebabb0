// Package luks is the header that keeps the key of an encrypted disk: version 1 of the Linux
// Unified Key Setup, as QEMU and cryptsetup read and write it. It does no I/O but through a Store,
// so that the header may begin a file or lie within an image of another format.
//
//	byte 0      Header, 592 bytes: cipher, hash, check of the key, 8 slots
//	byte 4096   the key material of slot 0, then of the others, each at a multiple of 4 KiB
//	payload     the sectors of the disk, counted from 0
//
// The disk has one key, the master key, which never changes. A slot that is active has it encrypted
// with what a password and PBKDF2 make, and spread over 4000 times as many bytes, all of which are
// needed (anti-forensic information splitter): to overwrite any of them is to forget the key.
//
// Orders of writes: a slot's material is on stable storage before the header calls the slot active,
// and the header calls it inactive there before the material is overwritten. So when the host fails
// in between, the slots that were not to be changed open the disk.
//
// What a header says is a stranger's: what is allocated for it is bounded by the length of the
// ciphers' keys, and the work that its numbers of iterations ask for ends with the command.
package luks
