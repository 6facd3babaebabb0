package blk

import "testing"

// TestBlocks compares Inner, Outer and Whole with what they say, block by block.
func TestBlocks(t *testing.T) {
	const align, size = 4, 18 // the last block is shorter
	for off := int64(0); off <= size; off++ {
		for end := off; end <= size; end++ {
			var in, out []int64 // ends of blocks that are covered, that are touched
			for b := int64(0); b < size; b += align {
				e := min(b+align, size)
				if off <= b && e <= end {
					in = append(in, b, e)
				}
				if b < end && off < e && off < end {
					out = append(out, b, e)
				}
			}
			check := func(what string, lo, hi int64, want []int64) {
				if len(want) == 0 && lo != hi || len(want) > 0 && (lo != want[0] || hi != want[len(want)-1]) {
					t.Errorf("%s of [%d, %d): [%d, %d), want %v", what, off, end, lo, hi, want)
				}
			}
			lo, hi := Inner(off, end, align, size)
			check("Inner", lo, hi, in)
			if lo, hi := Outer(off, end, align, size); off < end {
				check("Outer", lo, hi, out)
			}
		}
	}
	for n, want := range map[int64]Extent{
		1: {N: 4, Data: true}, 4: {N: 4, Zero: true}, 7: {N: 4, Zero: true}, 8: {N: 8, Zero: true}, 10: {N: 10, Zero: true},
	} {
		if x := (Extent{N: n, Zero: true}).Whole(8, size, align); x != want {
			t.Errorf("%d zeroes are %+v, want %+v", n, x, want)
		}
	}
	if x := (Extent{N: 5, Data: true}).Whole(8, size, align); x != (Extent{N: 8, Data: true}) {
		t.Errorf("data are %+v", x)
	}
}
