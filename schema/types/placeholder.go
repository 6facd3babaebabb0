package types

// These stand in for the generated types of the same names until the generator has written them.
type (
	BlockdevDetectZeroesOptions string
	BlockdevOptions             struct{}
	ImageInfo                   struct{}
	BlockStatsSpecific          struct{}
	XDbgBlockGraphNodeType      string
)
