package raw

import (
	"fmt"
	"syscall"

	"qblockd/graph/blk"
)

// guarded is how much of the file decides what its format is guessed to be.
const guarded = 512

// limits are those of the node: requests of whole sectors if the first one is guarded, so that no
// write changes a part of it unseen.
func (d *image) limits(below blk.Limits) blk.Limits {
	l := blk.Limits{OptTransfer: below.OptTransfer, ClusterSize: d.cluster(below.ClusterSize)}
	if d.guess != nil {
		l.RequestAlign = guarded
	}
	return l
}

// guards tells whether a change at that place of the file has to be looked at.
func (d *image) guards(at int64) bool { return at < guarded && d.guess != nil }

// changes is the place in the file of a request that writes v, or zeroes if it is empty; an error
// refuses it.
func (d *image) changes(r *blk.Req, v blk.Vec, off, n int64) (int64, error) {
	at, err := d.within(off, n, syscall.ENOSPC)
	if err == nil && d.guards(at) {
		err = d.keepsRaw(r, v, at, n)
	}
	return at, err
}

// keepsRaw refuses a change that would make the file, which was guessed to be raw, look like an
// image of another format the next time: the first n bytes of v, or zeroes if it is empty, at a
// place in the first sector. For a window that begins within that sector it reads the rest.
func (d *image) keepsRaw(r *blk.Req, v blk.Vec, at, n int64) error {
	if n == 0 {
		return nil
	}
	var head [guarded]byte
	part := head[at:min(at+n, guarded)]
	if len(part) < guarded {
		if have := min(d.file.Size(), guarded); have > 0 {
			if err := d.file.ReadAt(r, blk.Buf(head[:have]), 0, 0); err != nil {
				return err
			}
		}
		clear(part)
	}
	v.CopyOut(part)
	if !d.guess.Verbatim(head[:]) {
		return syscall.EPERM
	}
	return nil
}

// warnGuess says once that the node is writable although its format is a guess.
func (d *image) warnGuess() {
	if d.guess != nil && d.warned.CompareAndSwap(false, true) {
		d.warn(fmt.Sprintf("The format of '%s' was not given and is guessed to be raw; writes to its first sector that look like another format will fail. Give the format 'raw' to lift that.", d.guess.File))
	}
}

// PrepareReadOnly implements graph.ModeSwitcher.
func (d *image) PrepareReadOnly(*blk.Req, bool) error { return nil }

// CommitReadOnly implements graph.ModeSwitcher: a command makes the node writable.
func (d *image) CommitReadOnly(_ *blk.Req, readOnly bool) error {
	if !readOnly {
		d.warnGuess()
	}
	return nil
}
