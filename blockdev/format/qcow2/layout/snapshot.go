package layout

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

const (
	// SnapshotHeaderSize is the fixed part of an entry of the snapshot table.
	SnapshotHeaderSize = 40
	maxSnapshotExtra   = 1024
	maxSnapshotBytes   = 1024 * MaxSnapshots

	// MaxSnapshotID and MaxSnapshotName are how many bytes of an ID and of a name count, and are
	// shown, as in QEMU.
	MaxSnapshotID   = 127
	MaxSnapshotName = 255

	// MaxNames is what the names of all snapshots, with their IDs, or of all bitmaps of an image
	// may take together, in bytes: each query shows them.
	MaxNames = 4 << 20
)

// Snapshot is an internal snapshot (qcow2.txt, Snapshots).
type Snapshot struct {
	ID, Name      string
	L1TableOffset uint64
	L1Size        uint32 // entries
	DateSec       uint32
	DateNsec      uint32
	VMClockNsec   uint64
	VMStateSize   uint64
	DiskSize      uint64 // bytes
	Icount        uint64 // all ones: none
	raw           []byte // as it was parsed, without zeroes at the end
	rawLen        int
	extra         int // bytes of extra data, as it was parsed
}

// SnapshotNeed tells how many bytes it takes to parse the entry whose first SnapshotHeaderSize
// bytes are b; index is for errors.
func SnapshotNeed(b []byte, index int) (int, error) {
	be := binary.BigEndian
	extra := be.Uint32(b[36:])
	if extra > maxSnapshotExtra {
		return 0, fmt.Errorf("Too much extra metadata in snapshot table entry %d", index)
	}
	return SnapshotHeaderSize + int(extra) + int(be.Uint16(b[12:])) + int(be.Uint16(b[14:])), nil
}

// ParseSnapshot decodes one entry; b holds SnapshotNeed bytes and is not kept. diskSize is the
// image's own, valid for entries that do not record theirs.
func ParseSnapshot(b []byte, diskSize uint64) Snapshot {
	be := binary.BigEndian
	extra := int(be.Uint32(b[36:]))
	idLen, nameLen := int(be.Uint16(b[12:])), int(be.Uint16(b[14:]))
	s := Snapshot{
		L1TableOffset: be.Uint64(b),
		L1Size:        be.Uint32(b[8:]),
		DateSec:       be.Uint32(b[16:]),
		DateNsec:      be.Uint32(b[20:]),
		VMClockNsec:   be.Uint64(b[24:]),
		VMStateSize:   uint64(be.Uint32(b[32:])),
		DiskSize:      diskSize,
		Icount:        ^uint64(0),
	}
	x := b[SnapshotHeaderSize : SnapshotHeaderSize+extra]
	if len(x) >= 8 {
		s.VMStateSize = be.Uint64(x)
	}
	if len(x) >= 16 {
		s.DiskSize = be.Uint64(x[8:])
	}
	if len(x) >= 24 {
		s.Icount = be.Uint64(x[16:])
	}
	rest := b[SnapshotHeaderSize+extra:]
	s.extra = extra
	s.raw, s.rawLen = append([]byte(nil), bytes.TrimRight(b, "\x00")...), len(b)
	id, name := rest[:idLen], rest[idLen:idLen+nameLen]
	s.ID, s.Name = cString(id[:min(idLen, MaxSnapshotID)]), cString(name[:min(nameLen, MaxSnapshotName)])
	return s
}

// SnapshotTableTooBig tells whether a snapshot table of n bytes is refused.
func SnapshotTableTooBig(n int64) bool { return n > maxSnapshotBytes }

// AppendTo appends the entry of the snapshot table: as it was parsed, if it was.
func (s *Snapshot) AppendTo(b []byte) []byte {
	be := binary.BigEndian
	if s.raw != nil {
		b = append(append(b, s.raw...), make([]byte, s.rawLen-len(s.raw))...)
	} else {
		b = be.AppendUint64(b, s.L1TableOffset)
		b = be.AppendUint32(b, s.L1Size)
		b = be.AppendUint16(b, uint16(len(s.ID)))
		b = be.AppendUint16(b, uint16(len(s.Name)))
		b = be.AppendUint32(b, s.DateSec)
		b = be.AppendUint32(b, s.DateNsec)
		b = be.AppendUint64(b, s.VMClockNsec)
		b = be.AppendUint32(b, uint32(min(s.VMStateSize, 1<<32-1)))
		b = be.AppendUint32(b, 24) // bytes of what follows before the ID
		b = be.AppendUint64(b, s.VMStateSize)
		b = be.AppendUint64(b, s.DiskSize)
		b = be.AppendUint64(b, s.Icount)
		b = append(append(b, s.ID...), s.Name...)
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}
