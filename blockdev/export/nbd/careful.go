package nbd

import (
	"qblockd/blockdev/export"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// careful is the device of an export that has policies about errors. They are for workers, who can
// wait: what fails in line is carried out again by one.
type careful struct {
	Device
	errs *export.Errors
}

// or is err, or blk.ErrWouldBlock for a request in line about whose errors there is a policy.
func (d careful) or(r *blk.Req, op types.IoOperationType, err error) error {
	if err != nil && r.NoWait && d.errs.Covers(op, err) {
		return blk.ErrWouldBlock
	}
	return err
}

// ReadAt implements Device.
func (d careful) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.or(r, types.IoOperationTypeRead, d.Device.ReadAt(r, v, off, f))
}

// WriteAt implements Device.
func (d careful) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return d.or(r, types.IoOperationTypeWrite, d.Device.WriteAt(r, v, off, f))
}

// Zero implements Device.
func (d careful) Zero(r *blk.Req, off, n int64, f blk.Flags) error {
	return d.or(r, types.IoOperationTypeWrite, d.Device.Zero(r, off, n, f))
}

// Discard implements Device.
func (d careful) Discard(r *blk.Req, off, n int64) error {
	return d.or(r, types.IoOperationTypeWrite, d.Device.Discard(r, off, n))
}

// Flush implements Device.
func (d careful) Flush(r *blk.Req) error {
	return d.or(r, types.IoOperationTypeWrite, d.Device.Flush(r))
}

// Map implements Device. The errors of what is read from a mapping turn up when the reply has
// begun: too late to do anything but to tell the client.
func (d careful) Map(r *blk.Req, off, n int64, m *blk.Mapping) error {
	if d.errs.CoversReads() {
		return blk.ErrNotSupported
	}
	return d.Device.Map(r, off, n, m)
}
