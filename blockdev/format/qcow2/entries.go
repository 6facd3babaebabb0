package qcow2

import (
	"context"

	"qblockd/graph/blk"
)

const (
	pageBits    = 7 // entries of a page, log2: most tables have a few entries only
	pageEntries = 1 << pageBits
)

// entries is a table of the file in memory: an L1 table, or that of a bitmap. Pages of zeroes are
// not kept, so that it costs what is in it and not what it could hold. The zero value is all
// zeroes.
type entries struct {
	pages []*[pageEntries]uint64 // nil: zeroes, as is what lies behind
}

// at is entry i.
func (t *entries) at(i int64) uint64 {
	if p := i >> pageBits; p < int64(len(t.pages)) && t.pages[p] != nil {
		return t.pages[p][i&(pageEntries-1)]
	}
	return 0
}

func (t *entries) set(i int64, v uint64) {
	p := i >> pageBits
	if v == 0 && t.at(i) == 0 {
		return
	}
	for int64(len(t.pages)) <= p {
		t.pages = append(t.pages, nil)
	}
	if t.pages[p] == nil {
		t.pages[p] = new([pageEntries]uint64)
	}
	t.pages[p][i&(pageEntries-1)] = v
}

// next is the first entry from i on that is not zero, and where; a value of 0: there is none. A
// table may change while somebody goes through it:
//
//	for i, e := t.next(0); e != 0; i, e = t.next(i + 1) {
func (t *entries) next(i int64) (int64, uint64) {
	for p := i >> pageBits; p < int64(len(t.pages)); p++ {
		if t.pages[p] == nil {
			continue
		}
		for i = max(i, p<<pageBits); i < (p+1)<<pageBits; i++ {
			if v := t.pages[p][i&(pageEntries-1)]; v != 0 {
				return i, v
			}
		}
	}
	return i, 0
}

// dense is the table up to its last entry that is not zero, for tables that are small.
func (t *entries) dense() []uint64 {
	out := make([]uint64, 0, len(t.pages)*pageEntries)
	for i, e := t.next(0); e != 0; i, e = t.next(i + 1) {
		out = out[:i+1]
		out[i] = e
	}
	return out
}

// append appends the entries from first to behind as they are on disk.
func (t *entries) append(b []byte, first, behind int64) []byte {
	for i := first; i < behind; i++ {
		b = be.AppendUint64(b, t.at(i))
	}
	return b
}

// readTable reads the part of a table of n entries at off that lies in the file. What the file
// calls a hole is not read, so that the time is bounded by the file, too. It ends with the context
// of r.
func (s *imageFile) readTable(r *blk.Req, off, n int64) (entries, error) {
	const piece = 64 << 10
	var t entries
	size := s.file.Size()
	end := off + n*8
	if end > size {
		end = off + max(0, size-off+7)/8*8
	}
	buf := blk.GetBuf(int(min(max(end-off, 0), piece)), 0)
	defer blk.PutBuf(buf)
	for at, data := off, off; at < end; {
		if err := ended(r); err != nil {
			return t, err
		}
		if end-at > piece && at >= data {
			x, err := s.file.Status(r, at, min(end, size)-at)
			switch {
			case err != nil || x.N <= 0:
				data = end
			case x.Zero && !x.Data && x.N >= 8:
				at += x.N &^ 7
				data = at
				continue
			default:
				data = at + x.N
			}
		}
		b := buf.B[:min(piece, end-at)]
		if err := s.readFile(r, blk.Buf(b), at); err != nil {
			return t, err
		}
		for i := 0; i < len(b); i += 8 {
			if v := be.Uint64(b[i:]); v != 0 {
				t.set((at-off+int64(i))/8, v)
			}
		}
		at += int64(len(b))
	}
	return t, nil
}

// ended returns the error of work whose context has ended: nobody waits for it any more.
func ended(r *blk.Req) error {
	if r.Ctx == nil {
		return nil
	}
	return context.Cause(r.Ctx)
}
