package file

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// extent is a run of data [start, end) of the file. Only data is remembered: taking a hole
// that somebody made since for data is slow, taking new data for a hole would lose it.
type extent struct{ start, end int64 }

// Status implements graph.BlockStatuser by SEEK_DATA and SEEK_HOLE. A walk from front to back
// costs at most two seeks per extent.
func (d *disk) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	e := blk.Extent{N: n, Data: true, Allocated: true, OffValid: true, MapOff: off, EOF: off+n >= d.Size()}
	if d.device {
		return e, nil
	}
	if x := d.extent.Load(); x != nil && x.start <= off && off < x.end {
		return dataTo(e, off, n, x.end, d.limits.RequestAlign), nil
	}
	h, err := d.begin(r)
	if err != nil {
		return blk.Extent{}, err
	}
	defer d.end(h)
	if d.memory {
		// The kernel walks all pages of the extent, with the file locked: once is enough.
		d.seeking.Lock()
		defer d.seeking.Unlock()
		if x := d.extent.Load(); x != nil && x.start <= off && off < x.end {
			return dataTo(e, off, n, x.end, d.limits.RequestAlign), nil
		}
	}
	data, hole, err := findExtent(h.fd, off)
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but a hole up to the end
		e.Data, e.Zero = false, true
	case err != nil: // the file system cannot tell; data is always a right answer
	case data > off:
		e.Data, e.Zero = false, true
		if data-off < n {
			e.N, e.EOF = data-off, false
		}
	default:
		d.extent.Store(&extent{off, hole})
		e = dataTo(e, off, n, hole, d.limits.RequestAlign)
	}
	return e, nil
}

// dataTo cuts a data extent at end. An end that is no multiple of align, the request alignment, is
// the end of the file, and the rest of its last block belongs to it.
func dataTo(e blk.Extent, off, n, end, align int64) blk.Extent {
	if l := blk.AlignUp(end-off, align); l < n {
		e.N, e.EOF = l, false
	}
	return e
}

// findExtent looks where off lies. In data: data == off and hole is the data's end. In a
// hole: data > off is its end. ENXIO: only a hole follows, or the file ends before. Any
// other error: unknown.
func findExtent(fd int, off int64) (data, hole int64, err error) {
	data, err = unix.Seek(fd, off, unix.SEEK_DATA)
	if err != nil {
		return 0, 0, err
	}
	if data < off {
		return 0, 0, unix.EIO
	}
	if data > off {
		return data, off, nil
	}
	hole, err = unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	if hole <= off { // dug between the two calls
		return 0, 0, unix.EBUSY
	}
	return data, hole, nil
}

// Map implements graph.Mapper: all up to the end of the file maps to itself, the rest of
// the last sector to zeroes. Unaligned ranges of O_DIRECT files map to nothing, since
// whoever uses the mapping could not read them.
func (d *disk) Map(_ *blk.Req, off, n int64, m *blk.Mapping) error {
	if d.device && !d.block {
		return nil
	}
	if d.direct && !aligned(off, n, d.limits.RequestAlign) {
		return nil
	}
	h := d.hold()
	if h == nil {
		return blk.ErrClosed
	}
	in := min(n, max(d.eof.Load()-off, 0))
	if in > 0 {
		m.Add(blk.HostRange{FD: h.fd, Off: off, N: in, Direct: d.direct})
		m.Hold(h)
	} else {
		h.drop()
	}
	if in < n {
		m.Add(blk.HostRange{FD: -1, N: n - in})
	}
	return nil
}

// copyChunk bounds one copy_file_range call, so that a cancelled root is noticed.
const copyChunk = 16 << 20

// CopyFrom implements graph.CopyRanger by copy_file_range, which shares extents where the
// file system can. What it copied before it fails may stay.
func (d *disk) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	if d.device {
		return blk.ErrNotSupported
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	h, err := d.begin(r)
	if err != nil {
		return err
	}
	defer d.end(h)
	for _, s := range src {
		for s.N > 0 {
			if cancelled(r) {
				return unix.ECANCELED
			}
			from, to := s.Off, off
			k, err := unix.CopyFileRange(s.FD, &from, h.fd, &to, int(min(s.N, copyChunk)), 0)
			switch err {
			case nil:
			case unix.EINTR:
				continue
			case unix.ENOSYS, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOTTY, unix.EBADF, unix.ETXTBSY:
				return blk.ErrNotSupported
			default:
				return err
			}
			if k == 0 { // the source ends here; by hand its rest reads as zeroes
				return blk.ErrNotSupported
			}
			s.Off, s.N, off = s.Off+int64(k), s.N-int64(k), off+int64(k)
			d.grow(off)
			d.wrote(r, h, int64(k))
		}
	}
	if f&blk.FUA != 0 && !d.memory {
		return d.sync(r, h)
	}
	return nil
}

// seekEnd is the length of a file or device.
func seekEnd(fd int) (int64, error) { return unix.Seek(fd, 0, io.SeekEnd) }
