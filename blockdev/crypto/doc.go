// Package crypto encrypts the sectors of disks, and makes keys of passwords. It has the block
// ciphers, modes and initialization vectors that QEMU has for disks, and does no I/O.
//
// A Cipher is made of a Spec and a key and works on whole sectors of 512 bytes, whose numbers the
// format says where to count from. Its methods may be called from any goroutine and allocate
// nothing. What a Cipher makes of the key lies in memory of its own that is kept out of swap and
// core dumps where the host allows that, and is overwritten when it is closed; the one exception is
// AES on processors without instructions for it, whose key schedule package crypto/aes keeps.
//
// AES in mode XTS, which is what nearly every encrypted disk uses, has a path of its own for amd64
// (aes_amd64.s): 8 blocks at a time, several times as fast as one by one.
//
// Package luks, below, is the header that keeps the key of a disk.
package crypto
