package qcow2

import (
	"qblockd/blockdev/qcow2/layout"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// listBitmaps reads what image information shows of the persistent bitmaps of a read-only image. (One that is opened for
// writing has none from then on, see becomeWriter.) A broken directory is reported and shows no bitmaps: the guest's data does not depend on it.
func (s *image) listBitmaps(r *blk.Req) error {
	b := s.ext.Bitmaps
	if b == nil || !s.readOnly {
		return nil
	}
	if size := uint64(s.file.Size()); b.DirectoryOffset > size || b.DirectorySize > size-b.DirectoryOffset {
		s.warnf("Persistent bitmaps are not shown: their directory lies beyond the end of the file")
		return nil
	}
	dir := make([]byte, b.DirectorySize)
	if err := s.readFile(r, blk.Buf(dir), int64(b.DirectoryOffset)); err != nil {
		return wrap("Could not read bitmap directory", err)
	}
	entries, err := layout.ParseBitmapDirectory(dir, b.NbBitmaps)
	if err != nil {
		s.warnf("Persistent bitmaps are not shown: %v", err)
		return nil
	}
	s.bitmaps = make([]*types.Qcow2BitmapInfo, 0, len(entries))
	for _, e := range entries {
		x := &types.Qcow2BitmapInfo{Name: e.Name, Granularity: uint32(e.Granularity), Flags: []types.Qcow2BitmapInfoFlags{}}
		if e.Flags&layout.BitmapInUse != 0 {
			x.Flags = append(x.Flags, types.Qcow2BitmapInfoFlagsInUse)
		}
		if e.Flags&layout.BitmapAuto != 0 {
			x.Flags = append(x.Flags, types.Qcow2BitmapInfoFlagsAuto)
		}
		s.bitmaps = append(s.bitmaps, x)
	}
	return nil
}
