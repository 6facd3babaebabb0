package graph

import (
	"qblockd/graph/blk"
)

// CopyError is a failure of Copy: of reading the source or of writing the destination.
type CopyError struct {
	Write bool
	Err   error
}

// Error implements error, in the words that users are shown.
func (e *CopyError) Error() string { return blk.ErrnoText(e.Err) }

// Unwrap gives the failure of that side.
func (e *CopyError) Unwrap() error { return e.Err }

// Copy copies [off, off+n) of what src leads to into what dst leads to, with the flags f for
// writing: by the kernel where both sides lie in host files, else through memory; what turns out to
// be zeroes is zeroed. n should be at most a MiB or so: so much memory it may take. The caller
// keeps writers out. Errors: *CopyError.
func Copy(r *blk.Req, src, dst *Edge, off, n int64, f blk.Flags) error {
	if f&blk.Compressed == 0 {
		done := copyOffloaded(r, src, dst, off, n, f)
		off, n = off+done, n-done
	}
	if n == 0 {
		return nil
	}
	return CopyThroughMemory(r, src, dst, off, n, f)
}

// CopyThroughMemory is Copy without the kernel's help: all of the range is read, and finds zeroes
// wherever they are.
func CopyThroughMemory(r *blk.Req, src, dst *Edge, off, n int64, f blk.Flags) error {
	buf := blk.GetBuf(int(n), max(src.Caps().Limits.MemAlign, dst.Caps().Limits.MemAlign))
	defer blk.PutBuf(buf)
	v := blk.Buf(buf.B)
	if err := src.ReadAt(r, v, off, 0); err != nil {
		return &CopyError{Err: err}
	}
	var err error
	if v.IsZero() {
		err = dst.Zero(r, off, n, f&^blk.Compressed)
	} else {
		err = dst.WriteAt(r, v, off, f)
	}
	if err != nil {
		return &CopyError{Write: true, Err: err}
	}
	return nil
}

// copyOffloaded lets the kernel copy a prefix of the range and returns its length. What fails is
// left to be tried by hand, which tells the side that fails.
func copyOffloaded(r *blk.Req, src, dst *Edge, off, n int64, f blk.Flags) int64 {
	var m blk.Mapping
	defer m.Release()
	if err := src.Map(r, off, n, &m); err != nil {
		return 0
	}
	done := int64(0)
	for _, h := range m.Ranges {
		h.N = min(h.N, n-done)
		var err error
		if h.FD < 0 {
			err = dst.Zero(r, off+done, h.N, f)
		} else {
			err = dst.CopyFrom(r, off+done, []blk.HostRange{h}, f)
		}
		if err != nil {
			break
		}
		done += h.N
	}
	return done
}
