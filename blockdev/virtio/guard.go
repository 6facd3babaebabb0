package virtio

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
)

// ErrFault is in the chain of errors about guest memory that is mapped but not there any more.
var ErrFault = errors.New("guest memory has gone")

// Guard calls f, which touches guest memory, and returns its error. A fault at an address that f
// touched, which would end the process, ends f like a panic: its deferred functions run, and Guard
// returns an error that wraps ErrFault. Other panics pass. It allocates nothing; calls nest. The
// kernel does not fault: system calls that meet such memory fail with EFAULT. Memory of NewShared
// does not fault where package vanish has a handler; Guard is for all other.
func Guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		// Dereferencing nil has no Addr.
		fault, ok := r.(interface {
			runtime.Error
			Addr() uintptr
		})
		if !ok {
			panic(r)
		}
		err = fmt.Errorf("%w: fault at %#x", ErrFault, fault.Addr())
	}()
	return f()
}
