package qcow2

import "qblockd/graph/blk"

// Check looks the whole image over and changes nothing. On an image that is being written to, clusters
// that wait for a flush to be freed count as leaks. Requests that need metadata wait meanwhile; memory is
// bounded by the size of the file. Errors: what the file says where the check cannot go on.
func (d *Driver) Check(r *blk.Req) (*CheckResult, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.check(r, false)
}
