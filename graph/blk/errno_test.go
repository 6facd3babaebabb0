package blk

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"
)

func TestErrnoText(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{syscall.ENOENT, "No such file or directory"},
		{&fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, "Permission denied"},
		{fmt.Errorf("write: %w", syscall.ENOSPC), "No space left on device"},
		{syscall.EOPNOTSUPP, "Operation not supported"},
		{syscall.EIO, "Input/output error"},
		{syscall.EINVAL, "Invalid argument"},
		{syscall.EISDIR, "Is a directory"},
		{syscall.EAGAIN, "Resource temporarily unavailable"},
		{syscall.EROFS, "Read-only file system"},
		{syscall.ELIBSCN, ".lib section in a.out corrupted"},
		{syscall.ENOSTR, "Device not a stream"},
		{syscall.EMULTIHOP, "Multihop attempted"},
		{syscall.Errno(133), "Memory page has hardware error"},
		{syscall.Errno(41), "Unknown error 41"},
		{syscall.Errno(4000), "Unknown error 4000"},
		{ErrNotSupported, "Operation not supported"},
		{ErrReadOnly, "Operation not permitted"},
		{errors.New("x"), "Input/output error"},
	} {
		if got := ErrnoText(c.err); got != c.want {
			t.Errorf("ErrnoText(%v) = %q, want %q", c.err, got, c.want)
		}
	}
}
