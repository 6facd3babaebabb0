package fuse

import (
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// zeroPiece is how much is zeroed in one unit of work, in bytes: a drain waits for no more.
const zeroPiece = 256 << 20

// perform carries out the request in the unit of work.
func (r *reader) perform() error {
	switch r.q.op {
	case opRead:
		return r.performRead()
	case opWrite:
		return r.performWrite()
	case opLseek:
		return r.performSeek()
	}
	return r.root.Flush(r.unit)
}

// answer answers the request that was performed.
func (r *reader) answer() {
	if r.sent {
		return
	}
	b := r.reply[:outHeaderSize]
	switch r.q.op {
	case opRead:
		b = r.buf.B[dataAt-outHeaderSize : dataAt+r.io.n]
	case opWrite:
		b = le.AppendUint64(b, uint64(r.io.n)) // the size, and padding in either order of bytes
	case opLseek:
		b = le.AppendUint64(b, uint64(r.seek.off))
	}
	r.send(b)
}

// ignore answers as if the request had succeeded.
func (r *reader) ignore() {
	switch r.q.op {
	case opRead:
		clear(r.buf.B[dataAt : dataAt+r.io.n])
	case opLseek:
		if r.seek.whence == unix.SEEK_HOLE {
			r.seek.off = r.root.Size()
		}
	}
	r.answer()
}

// performRead reads what there is of the range: at the end of the file that is less, or nothing.
func (r *reader) performRead() error {
	a := &r.io
	if a.n = min(a.n, max(r.root.Size()-a.off, 0), maxData); a.n == 0 {
		return nil
	}
	if a.n >= mapMin {
		done, err := r.readMapped(a.off, a.n)
		if r.sent = done; done || err != nil {
			return err
		}
	}
	return r.root.ReadAt(r.unit, blk.Buf(r.buf.B[dataAt:dataAt+a.n]), a.off, 0)
}

// performWrite writes; at the end of a file that does not grow that is less.
func (r *reader) performWrite() error {
	a := &r.io
	if end := r.root.Size(); a.off+a.n > end {
		if r.growable {
			return blk.ErrWouldBlock // it has become shorter again
		}
		if a.n = max(end-a.off, 0); a.n == 0 {
			return syscall.EIO
		}
	}
	return r.root.WriteAt(r.unit, blk.Buf(a.data[:a.n]), a.off, r.flags())
}

// flags are those of a request that writes.
func (r *reader) flags() blk.Flags {
	if types.Or(r.export.Options.Writethrough, false) || r.q.op == opWrite && r.io.flags&unix.O_DSYNC != 0 {
		return blk.FUA
	}
	return 0
}

// performSeek looks for data or a hole.
func (r *reader) performSeek() error {
	a := &r.seek
	if a.whence != unix.SEEK_DATA && a.whence != unix.SEEK_HOLE {
		return syscall.EINVAL
	}
	end := r.root.Size()
	off := a.off
	for off < end {
		if err := r.unit.Stopped(); err != nil {
			return err
		}
		x, err := r.root.StatusAbove(r.unit, nil, false, off, end-off)
		if err != nil {
			return err
		}
		if x.N == 0 {
			break // it has become shorter
		}
		if x.Data == (a.whence == unix.SEEK_DATA) {
			a.off = off
			return nil
		}
		off += x.N
	}
	if off > end || a.whence == unix.SEEK_DATA {
		return syscall.ENXIO
	}
	a.off = off
	return nil
}

// grow makes room for a write beyond the end of a file that grows.
func (r *reader) grow() error {
	end := r.io.off + r.io.n
	if r.q.op != opWrite || !r.growable || end <= r.root.Size() {
		return nil
	}
	return r.resize(func(now int64) (int64, blk.Prealloc) { return max(now, end), blk.PreallocOff })
}

// allocate does a fallocate.
func (r *reader) allocate() error {
	a := &r.alloc
	switch {
	case a.mode == 0:
		return r.preallocate()
	case a.mode == unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE:
		return r.zero(blk.MayUnmap | blk.NoFallback)
	case a.mode&^unix.FALLOC_FL_KEEP_SIZE != unix.FALLOC_FL_ZERO_RANGE:
		return syscall.EOPNOTSUPP
	}
	was := r.root.Size()
	if end := a.off + a.n; a.mode&unix.FALLOC_FL_KEEP_SIZE == 0 && end > was {
		err := r.resize(func(now int64) (int64, blk.Prealloc) {
			was = now
			return max(now, end), blk.PreallocOff
		})
		if err != nil {
			return err
		}
	}
	a.n = min(a.n, max(was-a.off, 0)) // what was added is zeroes
	return r.zero(0)
}

// preallocate makes the file longer; that alone can be had.
func (r *reader) preallocate() error {
	a := &r.alloc
	fits := true
	longer := func(size int64, p blk.Prealloc) error {
		return r.resize(func(now int64) (int64, blk.Prealloc) {
			if fits = a.off >= now; !fits || size < now {
				return now, p
			}
			return size, p
		})
	}
	err := longer(a.off, blk.PreallocOff)
	if err == nil && fits {
		err = longer(a.off+a.n, blk.PreallocFalloc)
	}
	if err == nil && !fits {
		err = syscall.EOPNOTSUPP
	}
	return err
}

// zero makes what there is of the range read as zeroes.
func (r *reader) zero(f blk.Flags) error {
	off, end := r.alloc.off, min(r.alloc.off+r.alloc.n, r.root.Size())
	for off < end {
		if r.ctx.Err() != nil {
			return blk.ErrClosed
		}
		n := min(end-off, zeroPiece)
		if err := r.inUnit(func() error { return r.root.Zero(r.unit, off, n, f|r.flags()) }); err != nil {
			return err
		}
		off += n
	}
	return nil
}
