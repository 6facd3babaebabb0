package copy

import (
	"cmp"
	"slices"

	"qblockd/jobs"
)

// order holds the units that are not counted yet: the first of them is not over. There are not many
// more than workers.
type order []*unit

// find is where a unit at off is or has its place.
func (o order) find(off int64) int {
	at, _ := slices.BinarySearchFunc(o, off, func(v *unit, off int64) int { return cmp.Compare(v.off, off) })
	return at
}

// enter gives u its place, unless it has it.
func (o *order) enter(u *unit) {
	if !u.entered {
		u.entered = true
		*o = slices.Insert(*o, o.find(u.off), u)
	}
}

// leave takes u out again: others come in its place.
func (o *order) leave(u *unit) {
	if u.entered {
		u.entered = false
		at := o.find(u.off)
		*o = slices.Delete(*o, at, at+1)
	}
}

// done counts u, which has its place, and those behind it that are over, or lets it wait for those
// before it.
func (o *order) done(h *jobs.Handle, u *unit) {
	u.over = true
	for len(*o) > 0 && (*o)[0].over {
		h.Done((*o)[0].n)
		(*o)[0] = nil
		*o = (*o)[1:]
	}
}

// skipped counts n bytes at off with which nothing had to be done.
func (o *order) skipped(h *jobs.Handle, off, n int64) {
	at := o.find(off)
	switch {
	case at == 0:
		h.Done(n)
	case (*o)[at-1].over:
		(*o)[at-1].n += n
	default:
		o.enter(&unit{off: off, n: n, over: true})
	}
}
