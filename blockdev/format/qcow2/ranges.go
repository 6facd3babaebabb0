package qcow2

import (
	"cmp"
	"slices"
)

// ranges are parts of the file in order; no two touch.
type ranges []fileRange

type fileRange struct{ off, end int64 }

// makeRanges puts parts of the file in order and joins those that touch.
func makeRanges(l []fileRange) ranges {
	l = slices.DeleteFunc(l, func(r fileRange) bool { return r.off >= r.end })
	slices.SortFunc(l, func(a, b fileRange) int { return cmp.Compare(a.off, b.off) })
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

// touch tells whether one of them shares a byte with [off, end).
func (l ranges) touch(off, end int64) bool {
	i, _ := slices.BinarySearchFunc(l, off, func(r fileRange, off int64) int { return cmp.Compare(r.end, off+1) })
	return i < len(l) && l[i].off < end
}
