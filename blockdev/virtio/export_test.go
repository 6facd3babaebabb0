//go:build invariants

package virtio

// SetStep has f called before each store to memory that outlives a device. It is for tests.
func SetStep(f func()) { step = f }
