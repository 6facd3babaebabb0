package nbd

import (
	"context"
	"time"

	"qblockd/graph/blk"
)

// Device is what an export shows. Methods with a *blk.Req run between Begin or TryBegin and
// End, with ranges inside the size given to Server.Add. With r.NoWait they return blk.ErrWouldBlock
// rather than wait. All methods may be called from any goroutine.
type Device interface {
	// TryBegin passes the gate, or returns nil where Begin would have to wait.
	TryBegin() *blk.Req
	// Begin passes the gate; it waits while the gate is closed, no longer than ctx.
	Begin(ctx context.Context) (*blk.Req, error)
	// End ends the unit of work.
	End(r *blk.Req)

	ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error
	WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error
	Zero(r *blk.Req, off, n int64, f blk.Flags) error
	Discard(r *blk.Req, off, n int64) error
	Flush(r *blk.Req) error
	// Status tells about a prefix of the range, through the whole backing chain, with Depth. N is 0
	// only beyond the end of a device that has become shorter.
	Status(r *blk.Req, off, n int64) (blk.Extent, error)
	// Prefetch brings the range near: into the top layer or the host's cache, as the device likes.
	Prefetch(r *blk.Req, off, n int64) error
	// Map appends the host ranges behind a prefix of the range to m, possibly none.
	Map(r *blk.Req, off, n int64, m *blk.Mapping) error
	// Mapped tells that a read of n bytes was served from mapped ranges, and took that long.
	Mapped(n int64, took time.Duration)
	// Limits are those of the device at this time; RequestAlign and MaxTransfer count.
	Limits() blk.Limits
}
