package qcow2

import "sync"

// image is an open image.
type image struct {
	requests

	resizing sync.Mutex // one Resize at a time; taken before marking and mu

	closed    bool   // +checklocks:mu
	stopClean func() // +checklocks:mu
}
