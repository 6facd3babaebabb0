package qcow2

import (
	"bytes"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// Marks keep live bitmaps of an open image from missing writes when the program is killed or power
// fails (docs/bitmaps.md). A live bitmap has all its clusters in the image. Before the first write
// into a region of the disk since the image was opened, all bits of that region are set there, and
// are on stable storage. So a live bitmap never has less in the image than in memory. For others it
// is in use, and so inconsistent. For us it holds as long as the header says that nobody else has
// written: by AutoclearMarks, and the marks extension, which lists the tables of such bitmaps.

const (
	// minRegion and maxRegions: a region is 1 MiB, or a 4096th of a disk of more than 4 GiB. Each
	// costs a flush once, and is what one write makes a bitmap show after a crash.
	minRegion  = 1 << 20
	maxRegions = 4096
	// maxLiveBytes is what a live bitmap may take in the image, and maxLiveTotal what all of them
	// may; larger and further ones are not live.
	maxLiveBytes = 64 << 20
	maxLiveTotal = 256 << 20
	maxLive      = 2048 // the first write into a region has to wait for as many others
)

// marks tell in which regions of the disk all live bitmaps that record have all bits set in the
// image.
type marks struct {
	shift  uint
	marked []atomic.Uint64
}

func newMarks(size int64) *marks {
	m := &marks{shift: uint(bits.TrailingZeros(minRegion))}
	for size>>m.shift > maxRegions {
		m.shift++
	}
	m.marked = make([]atomic.Uint64, size>>m.shift>>6+1)
	return m
}

// regions are those that a range touches.
func (m *marks) regions(off, n int64) span { return span{off >> m.shift, (off+n-1)>>m.shift + 1} }

// cover tells whether all of a range is marked. What lies beyond the size that m was made for is
// not.
func (m *marks) cover(off, n int64) bool {
	for g, end := off>>m.shift, (off+n-1)>>m.shift; g <= end; g++ {
		if g>>6 >= int64(len(m.marked)) || m.marked[g>>6].Load()&(1<<(g&63)) == 0 {
			return false
		}
	}
	return true
}

func (m *marks) set(s span) {
	for g := s.off; g < s.end && g>>6 < int64(len(m.marked)); g++ {
		m.marked[g>>6].Or(1 << (g & 63))
	}
}

// spans are the regions that are marked.
func (m *marks) spans() (l []span) {
	for i := range m.marked {
		for w := m.marked[i].Load(); w != 0; w &= w - 1 {
			g := int64(i)<<6 + int64(bits.TrailingZeros64(w))
			l = with(l, span{g, g + 1})
		}
	}
	return l
}

// markQueue has what is to be marked by whoever comes next: those who wait for each other's flushes
// share them.
type markQueue struct {
	mu sync.Mutex
	l  []span // +checklocks:mu
}

func (q *markQueue) add(s span) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.l = append(q.l, s)
}

func (q *markQueue) take() []span {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.l
	q.l = nil
	return l
}

// mark is called before a write, without locks: live bitmaps must not miss it. If it fails, so does
// the write.
func (s *bitmaps) mark(r *blk.Req, off, n int64, f blk.Flags) error {
	m := s.marks.Load()
	if m == nil || f&blk.WriteUnchanged != 0 || n == 0 || m.cover(off, n) {
		return nil
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	return s.markNow(r, off, n)
}

func (s *bitmaps) markNow(r *blk.Req, off, n int64) error {
	if m := s.marks.Load(); m != nil {
		s.toMark.add(m.regions(off, n))
	}
	s.marking.Lock()
	defer s.marking.Unlock()
	m := s.marks.Load()
	if m == nil || m.cover(off, n) {
		return nil
	}
	// Those who came before may have taken ours and failed. Spans of an earlier size do no harm.
	all := makeRanges(append(s.toMark.take(), m.regions(off, n)))
	for _, b := range s.stored { // +checklocksignore: marking is held, without which it does not change
		if !b.live || !s.keeper.records(b.Name) {
			continue
		}
		for _, d := range all {
			if err := s.writeOnes(r, b, d.off<<m.shift, d.end<<m.shift); err != nil {
				return err
			}
		}
	}
	if err := s.file.Flush(r); err != nil {
		return err
	}
	for _, d := range all {
		m.set(d)
	}
	return nil
}

var ones = bytes.Repeat([]byte{0xff}, 4096)

// writeOnes sets the bits for a part of the disk in the image, and maybe a few more at its ends. It
// needs marking only.
func (s *bitmaps) writeOnes(r *blk.Req, b *stored, lo, hi int64) error {
	g := b.Granularity
	total := (s.bitmapSize() + g - 1) / g
	from, to := lo/g/8, (min((hi+g-1)/g, total)+7)/8
	for at := from; at < to; {
		in := at & (s.cs - 1)
		n := min(to-at, s.cs-in, int64(len(ones)))
		v := ones[:n]
		if end := at + n; end == (total+7)/8 && total%8 != 0 {
			v = append([]byte(nil), v...)
			v[n-1] = 1<<(total%8) - 1
		}
		if err := s.file.WriteAt(r, blk.Buf(v), int64(b.table[at>>s.cb])+in, 0); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// claimLive makes all bitmaps live, in a new directory, that hold and are not too large. Regions
// that are marked stay so.
// +checklocks:s.mu
func (s *bitmaps) claimLive(r *blk.Req) error {
	defer s.giveBack(r)
	want := s.keeper.persisted()
	var list, old []*stored
	named, room, live := byName(want), int64(maxLiveTotal), 0
	for _, m := range s.stored {
		p, n := named[m.Name], s.bitmapBytes(m.Granularity)
		if p == nil || p.inconsistent || n > min(maxLiveBytes, room) || live >= maxLive {
			same := *m
			same.Flags |= layout.BitmapInUse
			same.live = false
			list = append(list, &same)
			continue
		}
		room -= n
		b, err := s.writeLive(r, *p)
		if err != nil {
			return err
		}
		b.born = m.born
		live++
		list, old = append(list, b), append(old, m)
	}
	if live == 0 {
		return s.claimInPlace(r)
	}
	if err := s.switchDirectory(r, list, old); err != nil {
		return err
	}
	s.startMarks()
	return nil
}

// startMarks forgets what is marked: bitmaps that were not live, or did not record, do now. No
// write is under way, or those that are have their regions marked in all of them. What was written
// before has been flushed, so a bitmap that has forgotten it since, because a backup has it, needs
// no mark.
// +checklocks:s.mu
func (s *bitmaps) startMarks() {
	if slices.ContainsFunc(s.stored, func(b *stored) bool { return b.live }) {
		s.marks.Store(newMarks(s.bitmapSize()))
	} else {
		s.marks.Store(nil)
	}
}

// writeLive writes a bitmap with all its clusters, and the marks that there are.
// +checklocks:s.mu
func (s *bitmaps) writeLive(r *blk.Req, p persisted) (*stored, error) {
	b := &stored{BitmapEntry: layout.NewBitmap(p.name, p.bits.Granularity(), layout.BitmapInUse), live: true}
	if p.enabled {
		b.Flags |= layout.BitmapAuto
	}
	bits := p.bits
	if m := s.marks.Load(); m != nil && p.enabled {
		bits = bits.Clone()
		for _, x := range m.spans() {
			lo, hi := x.off<<m.shift, min(x.end<<m.shift, bits.Size())
			if lo < hi {
				bits.Set(lo, hi-lo)
			}
		}
	}
	b.table = make([]uint64, s.bitmapClusters(b.Granularity))
	b.TableSize = uint32(len(b.table))
	buf := make([]byte, 0, s.cs)
	for i := 0; i < len(b.table); {
		first, n, err := s.allocate(r, 1, int64(len(b.table)-i), "bitmap data")
		if err != nil {
			return nil, err
		}
		for c := first; c < first+n; c, i = c+1, i+1 {
			s.fresh = append(s.fresh, c)
			b.table[i] = uint64(c << s.cb)
			if !s.anyBit(bits, int64(i)) {
				s.wrote++
				s.noteEnd((c + 1) << s.cb)
				err = s.file.Zero(r, c<<s.cb, s.cs, blk.MayUnmap)
			} else {
				buf = bits.AppendBytes(buf[:0], int64(i)*s.cs*8, s.cs)
				err = s.writeMeta(r, buf, c<<s.cb, 0)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return b, s.writeTable(r, b, func(i int64) uint64 { return b.table[i] })
}

// anyBit tells whether a bit is set in cluster i of a bitmap.
func (s *imageFile) anyBit(b *bitmap.Bitmap, i int64) bool {
	per := s.cs * 8 * b.Granularity()
	_, _, dirty := b.NextDirty(i*per, min((i+1)*per, b.Size()))
	return dirty
}

// HoldBitmap implements graph.BitmapStore. What was written before is flushed: the bitmap does not
// have it, and a copy that was made meanwhile does, so it must not be lost.
func (s *bitmaps) HoldBitmap(r *blk.Req, name string) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	if !s.readOnly {
		if err := s.flush(r); err != nil {
			return err
		}
	}
	err := s.holdBitmap(r, name)
	if s.giveOut(r, err) {
		err = s.holdBitmap(r, name)
	}
	return err
}

// +checklocks:s.mu
func (s *bitmaps) holdBitmap(r *blk.Req, name string) error {
	if err := s.usable(); err != nil {
		return err
	}
	p := s.keeper.find(name)
	if s.readOnly || p == nil || p.inconsistent {
		return nil
	}
	defer s.claimFlush()()
	if i := slices.IndexFunc(s.stored, func(b *stored) bool { return b.Name == name }); i >= 0 {
		b := s.stored[i]
		if !b.live {
			return nil
		}
		if err := s.addBits(r, b, *p); err != nil {
			return err
		}
		s.startMarks()
		return s.setEnabled(r, b, p.enabled)
	}
	room, live := int64(maxLiveTotal), 0
	for _, b := range s.stored {
		if b.live {
			room -= s.bitmapBytes(b.Granularity)
			live++
		}
	}
	if s.bitmapBytes(p.bits.Granularity()) > min(maxLiveBytes, room) || live >= maxLive {
		return nil
	}
	defer s.giveBack(r)
	b, err := s.writeLive(r, *p)
	if err != nil {
		return err
	}
	b.born = true
	if err := s.switchDirectory(r, append(slices.Clone(s.stored), b), nil); err != nil {
		return err
	}
	s.startMarks()
	return nil
}

// setEnabled changes whether a bitmap records when it is loaded.
// +checklocks:s.mu
func (s *bitmaps) setEnabled(r *blk.Req, b *stored, enabled bool) error {
	was := b.Flags
	if b.Flags &^= layout.BitmapAuto; enabled {
		b.Flags |= layout.BitmapAuto
	}
	if b.Flags == was {
		return nil
	}
	if err := s.rewriteDirectory(r); err != nil {
		b.Flags = was
		return err
	}
	s.publishBitmaps()
	return nil
}

// addBits adds what a bitmap has in memory to what it has in the image.
// +checklocks:s.mu
func (s *bitmaps) addBits(r *blk.Req, b *stored, p persisted) error {
	old, buf := make([]byte, s.cs), make([]byte, 0, s.cs)
	for i, e := range b.table {
		if !s.anyBit(p.bits, int64(i)) {
			continue
		}
		if err := s.readFile(r, blk.Buf(old), int64(e)); err != nil {
			return err
		}
		buf = p.bits.AppendBytes(buf[:0], int64(i)*s.cs*8, s.cs)
		for j := range buf {
			buf[j] |= old[j]
		}
		if err := s.writeMeta(r, buf, int64(e), 0); err != nil {
			return err
		}
	}
	return s.barrier(r)
}

// forgetMarks makes no bitmap live. The marks extension goes with the next change of the header.
// +checklocks:s.mu
func (s *bitmaps) forgetMarks() {
	s.marks.Store(nil)
	for _, b := range s.stored {
		b.live = false
	}
	s.ext.Marks = nil
}

// distrust makes the header say that bitmaps in use do not hold: the extension has no meaning
// without the bit.
// +checklocks:s.mu
func (s *bitmaps) distrust(r *blk.Req) error {
	s.forgetMarks()
	if s.hdr.AutoclearFeatures&layout.AutoclearMarks == 0 {
		return nil
	}
	return s.writeAutoclear(r, s.hdr.AutoclearFeatures&^layout.AutoclearMarks)
}

// pauseMarks comes before a change of the size of the disk: until resumeMarks no bitmap is live.
// +checklocks:s.mu
func (s *bitmaps) pauseMarks(r *blk.Req) error {
	if err := s.flush(r); err != nil {
		return err
	}
	return s.writeAutoclear(r, s.hdr.AutoclearFeatures&^layout.AutoclearMarks)
}

// resumeMarks makes bitmaps live again, with what is marked.
// +checklocks:s.mu
func (s *bitmaps) resumeMarks(r *blk.Req) {
	// What was written meanwhile lies in regions that were marked before; all else waits.
	defer s.claimFlush()()
	r = patient(r)
	if e := s.claimLive(r); e != nil {
		_ = s.distrust(r) // the header says so already
		s.warnf("Persistent bitmaps will count as inconsistent if they are not stored in the end: %s", blk.ErrnoText(e))
	}
}
