//go:build linux && amd64

package vanish

import (
	"errors"
	"syscall"
	"unsafe"
)

// next is the handler that was there before.
var next uintptr

// sigaction is the kernel's struct (rt_sigaction(2)).
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

// handlerPC is the address of the handler.
func handlerPC() uintptr

// install puts our handler before the runtime's: with its flags, on its stacks.
func install() error {
	var a sigaction
	if err := action(nil, &a); err != nil {
		return err
	}
	if next = a.handler; next <= 1 { // the default, or ignored: nothing to go on with
		return errors.New("the runtime has no handler for SIGBUS")
	}
	a.handler = handlerPC()
	return action(&a, nil)
}

// action sets and gets what is done at SIGBUS.
func action(set, get *sigaction) error {
	_, _, e := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGBUS), uintptr(unsafe.Pointer(set)),
		uintptr(unsafe.Pointer(get)), unsafe.Sizeof(sigaction{}.mask), 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
