package layout

// Extended L2 entries (qcow2.txt, Extended L2 Entries): behind the word that plain entries have, a
// bitmap says of each of 32 subclusters whether it has data in the host cluster (bits 0 to 31), or
// reads as zeroes (bits 32 to 63). One with neither is unallocated, whether there is a host cluster
// or not.

const (
	// Subclusters is how many a cluster has.
	Subclusters    = 32
	subclusterBits = 5
	// AllAlloc and AllZero are the bits of all subclusters.
	AllAlloc = 1<<Subclusters - 1
	AllZero  = AllAlloc << Subclusters
)

// EntryBits is log2 of the length of an L2 entry.
func (g Geometry) EntryBits() uint {
	if g.Extended {
		return 4
	}
	return 3
}

// SubBits is log2 of the length of a subcluster: what an image allocates within a cluster, the
// whole one if its entries are plain.
func (g Geometry) SubBits() uint {
	if g.Extended {
		return g.ClusterBits - subclusterBits
	}
	return g.ClusterBits
}

// SubKind classifies subcluster i of the extended entry e with the bitmap bits.
func (g Geometry) SubKind(e, bits uint64, i int64) Kind {
	k := g.KindOf(e)
	if k == CompressedKind {
		return k
	}
	switch alloc, zero := bits>>i&1 != 0, bits>>(i+Subclusters)&1 != 0; {
	case alloc && zero, alloc && k != Normal:
		return Invalid
	case alloc:
		return Normal
	case zero && k == Normal:
		return ZeroAlloc
	case zero:
		return ZeroPlain
	}
	return Unallocated
}

// Possible tells whether the bitmap of the extended entry e can be.
func (g Geometry) Possible(e, bits uint64) bool {
	switch g.KindOf(e) {
	case CompressedKind:
		return bits == 0
	case Normal:
		return bits&(bits>>Subclusters) == 0
	}
	return bits&AllAlloc == 0
}

// SubMask has the bits of the subclusters that [from, to) of a cluster touches.
func (g Geometry) SubMask(from, to int64) uint64 {
	b := g.SubBits()
	first, behind := from>>b, (to+1<<b-1)>>b
	return 1<<behind - 1<<first
}
