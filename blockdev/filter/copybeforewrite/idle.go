package copybeforewrite

import (
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// Idle implements graph.Idler. While the filter has no parents others may change its source. If
// they do, the point in time begins anew when a parent comes; but not once something was copied,
// which is of the time before.
func (d *Driver) Idle(idle bool) {
	source := d.source()
	if source == nil || d.target() == nil {
		return // a job's filter that is leaving
	}
	switch gen := source.Node().IO().Generation(); {
	case idle:
		d.left = gen
	case gen == d.left:
	case d.done.Empty():
		d.begin(blk.AlignUp(source.Size(), blk.SectorSize))
	default:
		d.broken.Store(true)
	}
}

// begin makes the books those of a source of that size, of which nothing was copied. If the target
// cannot hold it there is no point in time.
func (d *Driver) begin(size int64) {
	if blk.AlignUp(d.target().Size(), blk.SectorSize) < size {
		d.broken.Store(true)
	}
	for _, b := range []*bitmap.Bitmap{d.done, d.access, d.pending} {
		if blk.AlignUp(b.Size(), blk.SectorSize) != size { // else its node has seen to that
			b.Resize(size)
		}
	}
	if d.wholly {
		d.pending.SetAll()
		d.access.SetAll()
	}
}
