// Package luks is the driver of encrypted disks, LUKS version 1: its file has the header with the
// keys (package crypto/luks), and behind that the sectors of the disk, each encrypted.
//
// Requests are encrypted and decrypted by whoever issues them, with nothing allocated and no lock:
// what is read is decrypted where it was read to, what is written goes through a buffer of the
// pool, 1 MiB at most at a time. All sectors are data, as nobody without the key can tell: writes
// of zeroes write encrypted zeroes, discards do nothing, and what a longer file adds reads as
// noise.
//
// The password is asked for when the image is opened and when its keys are changed, by the name of
// the object secret that has it. What is kept of it is the cipher's key schedule, in memory of its
// own that is overwritten when the node is closed.
package luks
