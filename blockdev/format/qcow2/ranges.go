package qcow2

import (
	"cmp"
	"slices"
)

// span is a part of the file or of the disk, in bytes, clusters or regions.
type span struct{ off, end int64 }

// ranges are spans in order; no two touch.
type ranges []span

// makeRanges puts spans in order and joins those that touch.
func makeRanges(l []span) ranges {
	l = slices.DeleteFunc(l, func(r span) bool { return r.off >= r.end })
	slices.SortFunc(l, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	out := l[:0]
	for _, r := range l {
		if k := len(out) - 1; k >= 0 && r.off <= out[k].end {
			out[k].end = max(out[k].end, r.end)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// with is l and x, which goes into the last one of l if it begins where that ends.
func with(l []span, x span) []span {
	if k := len(l) - 1; k >= 0 && l[k].end == x.off {
		l[k].end = x.end
		return l
	}
	return append(l, x)
}

// touch tells whether one of them shares a byte with [off, end).
func (l ranges) touch(off, end int64) bool {
	i, _ := slices.BinarySearchFunc(l, off, func(r span, off int64) int { return cmp.Compare(r.end, off+1) })
	return i < len(l) && l[i].off < end
}
