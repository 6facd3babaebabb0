package commit

import (
	"context"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// DriverName is how the job's filter shows itself, as in QEMU.
const DriverName = "commit_top"

// filterDriver sits above the top while the job runs and lets its parents read what they always
// read, although the nodes below are not consistent any more when they are looked at alone. It is
// read-only and transparent.
type filterDriver struct{ graph.PassReads }

// Caps implements graph.Driver.
func (f *filterDriver) Caps() graph.Caps { return graph.Caps{Transparent: true} }

// Resize implements graph.Resizer.
func (f *filterDriver) Resize(context.Context, int64, blk.Prealloc) error { return blk.ErrNotSupported }

// EdgeClaim implements graph.Permer: what lies below may be written to and need not be consistent.
func (f *filterDriver) EdgeClaim(string, perm.Role, perm.Claim, bool) perm.Claim {
	return perm.Claim{Share: perm.All}
}
