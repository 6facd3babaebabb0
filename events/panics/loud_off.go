//go:build !invariants

package panics

// Loud: this build is one to find bugs with. Its daemon ends with the first.
const Loud = false
