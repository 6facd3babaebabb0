// Package geometry copies disks of random shapes by all jobs, and compares what comes out with
// plain bytes: granularity, chunk, buffer, cluster sizes and versions of source and target, sizes
// (odd, below one granule, 0), backing files that are shorter or longer, holes, zeroes and
// compressed clusters, targets that are nodes, or files that the job opens or makes, bitmaps and
// their modes, error policies, speed, with guests that write, zero and discard meanwhile, and with
// each way for a job to end: success, cancel, a failing I/O, a killed process. Some disks are of up
// to a terabyte, with data around a few places: the ends, 2^31, 2^32, borders of granules
// (space.go).
//
// A sample is drawn from its seed and printed in one line. What runs at the same time is not part
// of it, so a failure may need several tries:
//
//	go test ./tests/geometry -run TestSamples \
//	    -geometry.seed=N -geometry.samples=1 -geometry.tries=100
//
// Tests only.
package geometry
