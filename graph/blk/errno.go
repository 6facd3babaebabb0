package blk

import (
	"errors"
	"strconv"
	"syscall"
)

// Errno is the errno that stands for err at the edges of the daemon (error policies, NBD
// replies, texts): the syscall.Errno in its chain, else the one a sentinel of this package
// maps to, else EIO. It is 0 for nil.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	switch {
	case errors.Is(err, ErrNotSupported):
		return syscall.ENOTSUP
	case errors.Is(err, ErrReadOnly):
		return syscall.EPERM
	case errors.Is(err, ErrWouldBlock):
		return syscall.EAGAIN
	case errors.Is(err, ErrNoMedium), errors.Is(err, ErrClosed):
		return syscall.ENOMEDIUM
	}
	return syscall.EIO
}

// ErrnoText is Errno(err) in the words of glibc's strerror, as they stand at the end of the
// reference's messages ("Could not open 'F': No such file or directory"). "" for nil.
func ErrnoText(err error) string {
	e := Errno(err)
	if e == 0 {
		return ""
	}
	// Go's table was made from glibc's with the first letter made small; numbers it does
	// not know have no text in either.
	if e == ehwpoison {
		return "Memory page has hardware error"
	}
	s := e.Error()
	if e >= 134 || s == "" || s == "errno "+strconv.Itoa(int(e)) {
		return "Unknown error " + strconv.Itoa(int(e))
	}
	if c := s[0]; 'a' <= c && c <= 'z' {
		return string(c-'a'+'A') + s[1:]
	}
	return s
}

// ehwpoison is EHWPOISON, which package syscall does not name.
const ehwpoison = syscall.Errno(133)
