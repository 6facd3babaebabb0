//go:build invariants

package virtio

// step is called before each store to memory that outlives this process. Tests set it: what it
// panics with ends the device there.
var step func()

func stepped() {
	if step != nil {
		step()
	}
}
