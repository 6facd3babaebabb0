// Package blklogwrites is the filter blklogwrites: every write, discard and flush that passes it is
// written to a log, in the format of the device mapper's target log-writes, so that a test can play
// them again up to any point.
//
//	sector 0     super block: magic, version, number of entries, sector size; little-endian,
//	             written at flushes and now and then
//	sector 1...  entry: sector, number of sectors, flags, 0; then, but for discards, the data
package blklogwrites

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// The format (device-mapper documentation, log-writes).
const (
	magic     = 0x6a736677736872
	version   = 1
	superSize = 28
	entrySize = 32

	flagFlush   = 1 << 0
	flagDiscard = 1 << 2
	flagsKnown  = 1<<4 - 1

	defaultSector   = 512
	defaultInterval = 4096
)

var le = binary.LittleEndian

type filter struct {
	graph.Passthrough
	sector   int64
	interval uint64

	mu sync.Mutex
	// sector of the next entry
	next    int64  // +checklocks:mu
	entries uint64 // +checklocks:mu
	// the last entry is a flush, or there is none
	flushed bool // +checklocks:mu

	super sync.Mutex // one super block is written at a time; taken before mu
}

func open(o *driver.Opening, u *types.BlockdevOptionsBlklogwrites) (graph.Driver, error) {
	d := &filter{
		Passthrough: graph.Through(o.Node),
		sector:      int64(types.Or(u.LogSectorSize, defaultSector)),
		interval:    types.Or(u.LogSuperUpdateInterval, defaultInterval),
		next:        1, flushed: true,
	}
	if types.Or(u.LogAppend, false) {
		if u.LogSectorSize != nil {
			return nil, errors.New("log-append and log-sector-size are mutually exclusive")
		}
		if err := d.resume(o.Req); err != nil {
			return nil, err
		}
	}
	if !sectorValid(d.sector) {
		return nil, fmt.Errorf("Invalid log sector size %d", d.sector)
	}
	if d.interval == 0 {
		return nil, errors.New("Invalid log superblock update interval 0")
	}
	return d, nil
}

func sectorValid(n int64) bool {
	return n >= entrySize && n < 1<<24 && bits.OnesCount64(uint64(n)) == 1
}

func (d *filter) log() *graph.Edge { return d.Node.Child("log") }

// resume finds the end of a log that is there.
// +checklocksignore: the driver is being opened, and nobody else knows it.
func (d *filter) resume(r *blk.Req) error {
	if d.log().Size() == 0 {
		return nil
	}
	b := make([]byte, superSize)
	if err := d.log().ReadAt(r, blk.Buf(b), 0, 0); err != nil {
		return fmt.Errorf("Could not read log superblock: %s", blk.ErrnoText(err))
	}
	if le.Uint64(b) != magic {
		return errors.New("Invalid log superblock magic")
	}
	if v := le.Uint64(b[8:]); v != version {
		return fmt.Errorf("Unsupported log version %d", v)
	}
	entries := le.Uint64(b[16:])
	if d.sector = int64(le.Uint32(b[24:])); !sectorValid(d.sector) {
		return nil // which is told next
	}
	e := make([]byte, entrySize)
	for i := range entries {
		if d.next > d.log().Size()/d.sector {
			return fmt.Errorf("Failed to read log entry %d: %s", i, "Input/output error")
		}
		if err := d.log().ReadAt(r, blk.Buf(e), d.next*d.sector, 0); err != nil {
			return fmt.Errorf("Failed to read log entry %d: %s", i, blk.ErrnoText(err))
		}
		flags := le.Uint64(e[16:])
		if flags&^flagsKnown != 0 {
			return fmt.Errorf("Invalid flags 0x%x in log entry %d", flags, i)
		}
		d.next++
		if n := le.Uint64(e[8:]); flags&flagDiscard == 0 {
			if n > uint64(blk.MaxSize/d.sector) {
				return fmt.Errorf("Failed to read log entry %d: %s", i, "Input/output error")
			}
			d.next += int64(n)
		}
	}
	d.entries = entries
	return nil
}

// Caps implements graph.Driver. Requests are whole sectors of the log; no data pass unseen, and
// writes with FUA are followed by a flush, which is logged.
func (d *filter) Caps() graph.Caps {
	c := d.Passthrough.Caps()
	c.WriteFlags, c.ZeroFlags = blk.WriteUnchanged, blk.WriteUnchanged|blk.MayUnmap
	c.Limits.RequestAlign = max(c.Limits.RequestAlign, d.sector)
	return c
}

// record appends an entry, which is there when record returns.
func (d *filter) record(r *blk.Req, e entry) error {
	head := make([]byte, d.sector)
	le.PutUint64(head, uint64(e.off/d.sector))
	le.PutUint64(head[8:], uint64(e.n/d.sector))
	le.PutUint64(head[16:], e.flags)
	size := d.sector
	if e.flags&flagDiscard == 0 {
		size += e.n
	}
	d.mu.Lock()
	at := d.next * d.sector
	d.next += size / d.sector
	d.entries++
	d.flushed = e.flags&flagFlush != 0
	due := d.flushed || d.entries%d.interval == 0
	d.mu.Unlock()

	err := d.log().WriteAt(r, blk.Bufs(e.data.AppendTo([][]byte{head})), at, 0)
	if err == nil && e.zeroes {
		err = d.log().Zero(r, at+d.sector, e.n, 0)
	}
	if err == nil && due {
		err = d.writeSuper(r)
	}
	return err
}

func (d *filter) writeSuper(r *blk.Req) error {
	d.super.Lock()
	defer d.super.Unlock()
	d.mu.Lock()
	entries := d.entries
	d.mu.Unlock()
	b := make([]byte, d.sector)
	le.PutUint64(b, magic)
	le.PutUint64(b[8:], version)
	le.PutUint64(b[16:], entries)
	le.PutUint32(b[24:], uint32(d.sector))
	if err := d.log().WriteAt(r, blk.Buf(b), 0, 0); err != nil {
		return err
	}
	return d.log().Flush(r)
}

// entry is what is logged of a request.
type entry struct {
	off, n int64
	flags  uint64
	data   blk.Vec
	zeroes bool // n zeroes are the data
}

// logged does something and logs it, as in QEMU also if it fails.
func (d *filter) logged(r *blk.Req, e entry, do func() error) error {
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	err := do()
	if e := d.record(r, e); e != nil {
		return e
	}
	return err
}

// WriteAt implements graph.Writer.
func (d *filter) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	e := entry{off: off, n: v.Len(), data: v}
	return d.logged(r, e, func() error { return d.Below().WriteAt(r, v, off, f) })
}

// Zero implements graph.Zeroer.
func (d *filter) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	e := entry{off: off, n: n, zeroes: true}
	return d.logged(r, e, func() error { return d.Below().Zero(r, off, n, f) })
}

// Discard implements graph.Discarder.
func (d *filter) Discard(r *blk.Req, off, n int64) error {
	e := entry{off: off, n: n, flags: flagDiscard}
	return d.logged(r, e, func() error { return d.Below().Discard(r, off, n) })
}

// Flush implements graph.Flusher. Where there is nothing to flush nothing is logged.
func (d *filter) Flush(r *blk.Req) error {
	d.mu.Lock()
	flushed := d.flushed
	d.mu.Unlock()
	if flushed {
		return d.Below().Flush(r)
	}
	return d.logged(r, entry{flags: flagFlush}, func() error { return d.Below().Flush(r) })
}

// CopyFrom implements graph.CopyRanger: what is not seen cannot be logged.
func (d *filter) CopyFrom(*blk.Req, int64, []blk.HostRange, blk.Flags) error {
	return blk.ErrNotSupported
}

// EdgeClaim implements graph.Permer.
func (d *filter) EdgeClaim(_ string, role perm.Role, up perm.Claim, readOnly bool) perm.Claim {
	return perm.Default(role, up, !readOnly, false)
}
