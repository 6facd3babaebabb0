package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"qblockd/graph/blk"
)

// Op is what a request asks for.
type Op uint8

const (
	// OpRefused: nothing is to be done; Request.Status says how the request is to be finished.
	OpRefused Op = iota
	OpRead
	OpWrite
	OpFlush
	OpGetID
	OpDiscard
	OpWriteZeroes
)

// Status is the last byte of a request, which the device writes.
type Status uint8

const (
	StatusOK Status = iota
	StatusIOErr
	StatusUnsupported
)

// Types of requests on the wire (VIRTIO_BLK_T_*).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13
	typeBarrier     = 1 << 31 // a flag of long ago, which may come with any type
)

const (
	headerSize  = 16 // le32 type, reserved; le64 sector
	segmentSize = 16 // le64 sector; le32 number of sectors, flags
	// segmentUnmap: zeroes may be made by discarding. All other flags are reserved.
	segmentUnmap = 1
	// idSize is how much of a serial number there is room for.
	idSize = 20
)

// Segment is a range of a discard or of a write of zeroes, in bytes.
type Segment struct {
	Off, N int64
	Unmap  bool // the zeroes may be made by discarding
}

// BlkLimits is what requests are held against, as the configuration space tells it to the driver.
type BlkLimits struct {
	BlockSize          int64 // bytes, a power of two from 512: where requests may begin
	MaxDiscardSectors  uint32
	MaxDiscardSegments uint32
	MaxZeroSectors     uint32
	MaxZeroSegments    uint32
}

// Request is one of virtio-blk, and the memory for one: whoever pools Requests pools their
// slices. It is in flight from Pop to Finish or Drop.
type Request struct {
	chain Chain

	Op Op
	// Status is how to finish a request that is refused.
	Status Status
	// Off and N are the range of OpRead and OpWrite, in bytes. It ends below 2^63, and N is a
	// multiple of 512; whether it is within the disk is for the caller to check.
	Off, N int64
	// Data is the guest's memory: to read into (OpRead, OpGetID) or to write from (OpWrite).
	Data blk.Vec
	// Segments are the ranges of OpDiscard and OpWriteZeroes; they end below 2^63.
	Segments []Segment

	status  []byte // one byte of the guest's
	written uint32 // of Data, by SetID
}

// Pop takes the next request of q, if there is one. What only this request does wrong makes it
// OpRefused; one that has no status byte breaks the queue.
func (r *Request) Pop(q *Queue, l *BlkLimits) (ok bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	popped := false
	err = Guard(func() (e error) {
		if ok, e = q.pop(&r.chain); !ok || e != nil {
			return e
		}
		popped = true
		return r.parse(l)
	})
	if err != nil {
		if popped {
			r.Drop(q)
		}
		return false, q.broken(err)
	}
	return ok, nil
}

// errNoStatus: there is no byte that could say what became of the request.
var errNoStatus = errors.New("a request has no byte for its status")

// parse makes r what its chain says. Header, data and status are in no particular descriptors.
func (r *Request) parse(l *BlkLimits) error {
	c := &r.chain
	r.Op, r.Status, r.Off, r.N, r.Data, r.written = OpRefused, StatusIOErr, 0, 0, blk.Vec{}, 0
	r.Segments = r.Segments[:0]
	if c.inLen == 0 {
		return errNoStatus
	}
	last := &c.segs[len(c.segs)-1]
	r.status = (*last)[len(*last)-1:]
	var h [headerSize]byte
	out, n := takeFront(c.Out(), h[:])
	if n < headerSize {
		return nil
	}
	in := c.In()
	if *last = (*last)[:len(*last)-1]; len(*last) == 0 {
		in = in[:len(in)-1]
	}
	sector := binary.LittleEndian.Uint64(h[8:])
	switch binary.LittleEndian.Uint32(h[0:]) &^ typeBarrier {
	case typeIn:
		r.transfer(OpRead, sector, in, c.inLen-1, l)
	case typeOut:
		r.transfer(OpWrite, sector, out, c.outLen-headerSize, l)
	case typeFlush:
		r.Op = OpFlush
	case typeGetID:
		r.Op, r.Data = OpGetID, blk.Bufs(in)
	case typeDiscard:
		r.ranges(OpDiscard, out, c.outLen-headerSize, l.MaxDiscardSegments, l.MaxDiscardSectors, l)
	case typeWriteZeroes:
		r.ranges(OpWriteZeroes, out, c.outLen-headerSize, l.MaxZeroSegments, l.MaxZeroSectors, l)
	default:
		r.Status = StatusUnsupported
	}
	return nil
}

// takeFront moves bytes from the front of bufs to dst, and returns what is left and how many there
// were.
func takeFront(bufs [][]byte, dst []byte) (rest [][]byte, n int) {
	for len(bufs) > 0 && n < len(dst) {
		k := copy(dst[n:], bufs[0])
		n += k
		if k < len(bufs[0]) {
			bufs[0] = bufs[0][k:]
			break
		}
		bufs = bufs[1:]
	}
	return bufs, n
}

// transfer makes r a read or a write of n bytes.
func (r *Request) transfer(op Op, sector uint64, bufs [][]byte, n uint64, l *BlkLimits) {
	off, ok := r.place(sector, n, l)
	if !ok || n%blk.SectorSize != 0 || n > math.MaxInt32 {
		return
	}
	r.Op, r.Off, r.N, r.Data = op, off, int64(n), blk.Bufs(bufs)
}

// place is the offset of a sector, if n bytes from there on are a range.
func (r *Request) place(sector, n uint64, l *BlkLimits) (int64, bool) {
	if sector > math.MaxInt64/blk.SectorSize {
		return 0, false
	}
	off := int64(sector * blk.SectorSize)
	return off, int64(n) <= math.MaxInt64-off && off&(l.BlockSize-1) == 0
}

// ranges makes r a discard or a write of zeroes; data has n bytes of segments.
func (r *Request) ranges(op Op, data [][]byte, n uint64, maxSegments, maxSectors uint32, l *BlkLimits) {
	switch {
	case n == 0 || n%segmentSize != 0:
		return
	case n/segmentSize > uint64(maxSegments):
		r.Status = StatusUnsupported
		return
	}
	for range n / segmentSize {
		var s [segmentSize]byte
		data, _ = takeFront(data, s[:])
		sector, sectors := binary.LittleEndian.Uint64(s[0:]), binary.LittleEndian.Uint32(s[8:])
		flags := binary.LittleEndian.Uint32(s[12:])
		off, ok := r.place(sector, uint64(sectors)*blk.SectorSize, l)
		if !ok || sectors > maxSectors {
			return
		}
		if flags&^segmentUnmap != 0 || flags != 0 && op == OpDiscard {
			r.Status = StatusUnsupported
			return
		}
		r.Segments = append(r.Segments, Segment{off, int64(sectors) * blk.SectorSize, flags != 0})
	}
	r.Op = op
}

// SetID answers OpGetID with a serial number, of which 20 bytes are told. Error: see Guard; the
// request is to be finished all the same.
func (r *Request) SetID(id string) error {
	var b [idSize]byte
	copy(b[:], id)
	return Guard(func() error {
		r.written = uint32(r.Data.CopyIn(b[:]))
		return nil
	})
}

// Finish writes the status and stages the request, see Queue.Put. Error: the queue is broken.
func (r *Request) Finish(q *Queue, s Status) error {
	err := Guard(func() error {
		r.status[0] = byte(s)
		return nil
	})
	written := r.reach(s)
	// The status is a part of the chain again, which is logged.
	last := &r.chain.segs[len(r.chain.segs)-1]
	*last = (*last)[:cap(*last)]
	r.forget()
	if err = q.broken(err); err != nil {
		q.Drop(&r.chain)
		return err
	}
	return q.Put(&r.chain, written)
}

// reach is how many bytes the device has written from the beginning of what it may write without
// a gap: all of it up to the status, or nothing that can be told.
func (r *Request) reach(s Status) uint32 {
	data := r.chain.inLen - 1
	switch {
	case r.Op == OpRead && s == StatusOK, data == 0:
		return uint32(min(data+1, math.MaxUint32))
	case uint64(r.written) == data:
		return r.written + 1
	}
	return r.written
}

// Drop ends a request that the driver is not told of, see Queue.Drop.
func (r *Request) Drop(q *Queue) {
	r.forget()
	q.Drop(&r.chain)
}

// forget drops the pointers to the guest's memory.
func (r *Request) forget() { r.Data, r.status = blk.Vec{}, nil }

// String is for logs.
func (op Op) String() string {
	names := [...]string{"refused", "read", "write", "flush", "get-id", "discard", "write-zeroes"}
	if int(op) < len(names) {
		return names[op]
	}
	return fmt.Sprintf("op %d", op)
}
