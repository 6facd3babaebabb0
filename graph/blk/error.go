package blk

import (
	"errors"
	"fmt"
	"strconv"
	"syscall"
)

// Sentinels. I/O errors are not among them: they keep their syscall.Errno in the chain.
var (
	// ErrWouldBlock: a Req with NoWait could not be served without waiting; nothing was changed or
	// counted.
	ErrWouldBlock = errors.New("request would block")
	// ErrCorrupt: on-disk metadata contradicts itself.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrNotSupported: the driver cannot do this operation (ENOTSUP).
	ErrNotSupported = errors.New("operation not supported")
	// ErrOutOfRange: beyond the end of the node (EIO or EINVAL at the edge of the daemon).
	ErrOutOfRange = errors.New("request is out of range")
	// ErrReadOnly: a write to a read-only node (EPERM).
	ErrReadOnly = errors.New("block node is read-only")
	// ErrClosed: the node or root has gone.
	ErrClosed = errors.New("block node is closed")
	// ErrNoMedium: nothing is inserted.
	ErrNoMedium = errors.New("no medium")
)

// Text is an error that reads text alone. What it stands for, an errno or a sentinel, is in its
// chain.
func Text(text string, cause error) error { return &textError{text, cause} }

// Errnof is the error "TEXT: ERRNO IN WORDS", with err in its chain.
func Errnof(err error, format string, a ...any) error {
	return &textError{fmt.Sprintf(format, a...) + ": " + ErrnoText(err), err}
}

type textError struct {
	text  string
	cause error
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.cause }

// WithHint is err with advice that is printed below it at a terminal, and that QMP does not tell.
// The program finds it by the method Hint.
func WithHint(err error, hint string) error { return &hintError{err, hint} }

type hintError struct {
	error
	hint string
}

func (e *hintError) Unwrap() error { return e.error }
func (e *hintError) Hint() string  { return e.hint }

// WithClass is err with the error class that QMP reports, which it finds by the method QMPClass.
func WithClass(err error, class string) error { return &classError{err, class} }

type classError struct {
	error
	class string
}

func (e *classError) Unwrap() error    { return e.error }
func (e *classError) QMPClass() string { return e.class }

// Errno is the errno that stands for err at the edges of the daemon (error policies, NBD replies,
// texts): the syscall.Errno in its chain, else the one a sentinel of this package maps to, else
// EIO. It is 0 for nil.
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

// ErrnoText is Errno(err) in the words of glibc's strerror, as they stand at the end of QEMU's
// messages ("Could not open 'F': No such file or directory"). "" for nil.
func ErrnoText(err error) string {
	e := Errno(err)
	if e == 0 {
		return ""
	}
	// Go's table is glibc's with the first letter made small.
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
