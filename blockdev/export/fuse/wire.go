package fuse

import (
	"encoding/binary"
	"errors"
	"syscall"
)

// Sizes of the protocol's structures, in bytes.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
	rwArgSize     = 40 // of reads and writes
	attrSize      = 88
)

// opcode says what a request asks for.
type opcode uint32

// Those that we know; all others are answered with ENOSYS.
const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opBatchForget opcode = 42
	opFallocate   opcode = 43
	opLseek       opcode = 46
)

// Version of the protocol.
const (
	protoMajor = 7
	protoMinor = 36
)

// What can be agreed on with the kernel.
const (
	initAsyncRead     = 1 << 0
	initAtomicTrunc   = 1 << 3 // O_TRUNC comes with opening, where it means nothing to a disk
	initBigWrites     = 1 << 5
	initAutoInvalData = 1 << 12
	initAsyncDIO      = 1 << 15
	initMaxPages      = 1 << 22
	initExt           = 1 << 30 // there are flags beyond 32 bits
	initDirectMmap    = 1 << 36 // files opened with openDirect can be mapped
)

// Flags of the reply to opening.
const (
	openDirect         = 1 << 0 // no page cache
	openNoFlush        = 1 << 5 // no opFlush when it is closed
	openParallelWrites = 1 << 6
)

// What Setattr is to set.
const (
	setMode      = 1 << 0
	setUID       = 1 << 1
	setGID       = 1 << 2
	setSize      = 1 << 3
	setFH        = 1 << 6
	setLockOwner = 1 << 9
	setKillPriv  = 1 << 11
	// setIgnored say how, not what.
	setIgnored = setFH | setLockOwner | setKillPriv
)

var (
	le       = binary.NativeEndian
	errShort = errors.New("FUSE request is cut short")
)

// request is the head of what the kernel asks. All numbers are the kernel's word, and checked like
// anybody's.
type request struct {
	op     opcode
	unique uint64 // of the request; goes back in the reply
	thread uint32 // who asks; 0: nobody that we could know
	arg    []byte // what follows, of the reader's buffer
}

// parse takes apart b, which is one request as read.
func (q *request) parse(b []byte) error {
	if len(b) < inHeaderSize || int64(le.Uint32(b)) != int64(len(b)) {
		return errShort
	}
	q.op, q.unique, q.arg = opcode(le.Uint32(b[4:])), le.Uint64(b[8:]), b[inHeaderSize:]
	q.thread = le.Uint32(b[32:])
	return nil
}

// span is the range that a request is about.
type span struct {
	off, n int64
}

// isRange tells whether the numbers, which the kernel counts as unsigned, are a range of a file.
func (s span) isRange() bool { return s.off >= 0 && s.n >= 0 && s.off <= maxInt64-s.n }

const maxInt64 = 1<<63 - 1

// ioArg is that of reading and writing.
type ioArg struct {
	span
	flags uint32 // of the open file
	data  []byte // to be written
}

func (a *ioArg) parse(b []byte, write bool) error {
	if len(b) < rwArgSize {
		return errShort
	}
	a.off, a.n, a.flags = int64(le.Uint64(b[8:])), int64(le.Uint32(b[16:])), le.Uint32(b[32:])
	if a.data = nil; write {
		if a.data = b[rwArgSize:]; int64(len(a.data)) != a.n {
			return errShort
		}
	}
	if !a.isRange() {
		return syscall.EINVAL
	}
	return nil
}

// allocArg is that of fallocate.
type allocArg struct {
	span
	mode uint32
}

func (a *allocArg) parse(b []byte) error {
	if len(b) < 32 {
		return errShort
	}
	a.off, a.n, a.mode = int64(le.Uint64(b[8:])), int64(le.Uint64(b[16:])), le.Uint32(b[24:])
	if !a.isRange() {
		return syscall.EFBIG
	}
	return nil
}

// seekArg is that of lseek.
type seekArg struct {
	off    int64
	whence uint32
}

func (a *seekArg) parse(b []byte) error {
	if len(b) < 24 {
		return errShort
	}
	a.off, a.whence = int64(le.Uint64(b[8:])), le.Uint32(b[16:])
	if a.off < 0 {
		return syscall.ENXIO
	}
	return nil
}

// setArg is that of setattr.
type setArg struct {
	valid          uint32
	size           int64
	mode, uid, gid uint32
}

func (a *setArg) parse(b []byte) error {
	if len(b) < 88 {
		return errShort
	}
	a.valid, a.size = le.Uint32(b)&^setIgnored, int64(le.Uint64(b[16:]))
	a.mode, a.uid, a.gid = le.Uint32(b[68:]), le.Uint32(b[76:]), le.Uint32(b[80:])
	if a.valid&setSize != 0 && a.size < 0 {
		return syscall.EFBIG
	}
	return nil
}

// openFlags are those of open(2).
func openFlags(b []byte) (uint32, error) {
	if len(b) < 8 {
		return 0, errShort
	}
	return le.Uint32(b), nil
}

// initArg is what the kernel offers.
type initArg struct {
	major, minor, readahead uint32
	flags                   uint64
}

func (a *initArg) parse(b []byte) error {
	if len(b) < 16 {
		return errShort
	}
	a.major, a.minor, a.readahead, a.flags = le.Uint32(b), le.Uint32(b[4:]), le.Uint32(b[8:]), uint64(le.Uint32(b[12:]))
	if a.flags&initExt != 0 && len(b) >= 20 {
		a.flags |= uint64(le.Uint32(b[16:])) << 32
	}
	return nil
}

// initReply is what we take of it.
type initReply struct {
	flags     uint64
	readahead uint32 // bytes
	requests  uint16 // those that nobody waits for, under way at once
	maxWrite  uint32 // bytes
}

func (r *initReply) appendTo(b []byte) []byte {
	b = le.AppendUint32(b, protoMajor)
	b = le.AppendUint32(b, protoMinor)
	b = le.AppendUint32(b, r.readahead)
	b = le.AppendUint32(b, uint32(r.flags))
	b = le.AppendUint16(b, r.requests)
	b = le.AppendUint16(b, r.requests-r.requests/4) // where the kernel calls it congested
	b = le.AppendUint32(b, r.maxWrite)
	b = le.AppendUint32(b, 1) // resolution of times: nanoseconds
	b = le.AppendUint16(b, uint16(r.maxWrite/pageSize))
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, uint32(r.flags>>32))
	return append(b, make([]byte, 28)...)
}

// attr is what stat shows.
type attr struct {
	size, allocated int64 // bytes
	now             int64 // seconds
	mode, uid, gid  uint32
	blockSize       uint32
}

// rootInode is the number of the file, the only one.
const rootInode = 1

// appendTo appends a, valid for so many seconds, as the reply to getattr and setattr.
func (a *attr) appendTo(b []byte, valid uint64) []byte {
	b = le.AppendUint64(b, valid)
	b = le.AppendUint64(b, 0)
	b = le.AppendUint64(b, rootInode)
	b = le.AppendUint64(b, uint64(a.size))
	b = le.AppendUint64(b, uint64((a.allocated+511)/512))
	for range 3 {
		b = le.AppendUint64(b, uint64(a.now))
	}
	for range 3 {
		b = le.AppendUint32(b, 0) // nanoseconds
	}
	b = le.AppendUint32(b, a.mode)
	b = le.AppendUint32(b, 1) // links
	b = le.AppendUint32(b, a.uid)
	b = le.AppendUint32(b, a.gid)
	b = le.AppendUint32(b, 0) // device
	b = le.AppendUint32(b, a.blockSize)
	return le.AppendUint32(b, 0)
}

// appendStatfs appends the reply to statfs: a file system without space, as far as it knows.
func appendStatfs(b []byte) []byte {
	b = append(b, make([]byte, 40)...)
	b = le.AppendUint32(b, 512) // block size
	b = le.AppendUint32(b, 255) // length of names
	return append(b, make([]byte, 32)...)
}

// appendInvalidate appends the notice that the attributes have changed, not the data.
func appendInvalidate(b []byte) []byte {
	const invalidateInode = 2
	b = le.AppendUint32(b, outHeaderSize+24)
	b = le.AppendUint32(b, invalidateInode)
	b = le.AppendUint64(b, 0) // no reply
	b = le.AppendUint64(b, rootInode)
	b = le.AppendUint64(b, ^uint64(0))
	return le.AppendUint64(b, 0)
}

// putHead writes the head of a reply of n bytes after it into b.
func putHead(b []byte, unique uint64, errno syscall.Errno, n int) {
	le.PutUint32(b, uint32(outHeaderSize+n))
	le.PutUint32(b[4:], uint32(-int32(errno)))
	le.PutUint64(b[8:], unique)
}
