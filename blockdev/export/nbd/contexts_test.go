package nbd

import (
	"slices"
	"testing"

	"qblockd/blockdev/nbdwire"
)

// What queries ask for: names in full, and for a list also the namespaces. The name of a bitmap may
// look like one.
func TestQueriedContexts(t *testing.T) {
	exp := &Export{contexts: contexts(&Spec{AllocationDepth: true, Bitmaps: []Bitmap{{Name: "a"}, {Name: "a:b"}}})}
	const a, ab = idBitmap, idBitmap + 1
	for _, c := range []struct {
		queries   []string
		set, list []uint32
	}{
		{nil, nil, []uint32{idAllocation, idDepth, a, ab}},
		{[]string{""}, nil, nil},
		{[]string{"base:allocation"}, []uint32{idAllocation}, []uint32{idAllocation}},
		{[]string{"base:"}, nil, []uint32{idAllocation}},
		{[]string{"base:alloc", "bas", "base"}, nil, nil},
		{[]string{"qemu:"}, nil, []uint32{idDepth, a, ab}},
		{[]string{"qemu:allocation-depth", "base:allocation"}, []uint32{idAllocation, idDepth}, []uint32{idAllocation, idDepth}},
		{[]string{"qemu:dirty-bitmap:"}, nil, []uint32{a, ab}},
		{[]string{"qemu:dirty-bitmap:a"}, []uint32{a}, []uint32{a}},
		{[]string{"qemu:dirty-bitmap:a:"}, nil, nil},
		{[]string{"qemu:dirty-bitmap:a:b", "qemu:dirty-bitmap:c"}, []uint32{ab}, []uint32{ab}},
	} {
		for list, want := range map[bool][]uint32{false: c.set, true: c.list} {
			q, err := nbdwire.ParseMetaQueries(nbdwire.AppendMetaQueries(nil, "x", c.queries...))
			if err != nil {
				t.Fatal(err)
			}
			var got []uint32
			chosen, err := queried(exp, &q, list)
			for _, x := range chosen {
				got = append(got, x.id)
			}
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%q, list %v: %v %v, want %v", c.queries, list, got, err, want)
			}
		}
	}
}
