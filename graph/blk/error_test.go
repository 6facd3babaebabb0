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

// TestWords: errors that say something of their own keep what they stand for, and carry hint and
// class through errors around them.
func TestWords(t *testing.T) {
	err := Text("Image is read-only", errors.Join(ErrReadOnly, syscall.EACCES))
	if err.Error() != "Image is read-only" || !errors.Is(err, ErrReadOnly) || Errno(err) != syscall.EACCES {
		t.Errorf("Text: %v, errno %v", err, Errno(err))
	}
	err = Errnof(fmt.Errorf("write: %w", syscall.ENOSPC), "Could not grow '%s'", "a%d")
	if err.Error() != "Could not grow 'a%d': No space left on device" || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Errnof: %v", err)
	}
	var hint interface{ Hint() string }
	var class interface{ QMPClass() string }
	both := fmt.Errorf("around: %w", WithClass(WithHint(err, "free some"), "DeviceNotFound"))
	if !errors.As(both, &hint) || hint.Hint() != "free some" || !errors.As(both, &class) || class.QMPClass() != "DeviceNotFound" {
		t.Errorf("hint %v, class %v", hint, class)
	}
	if both.Error() != "around: "+err.Error() || !errors.Is(both, syscall.ENOSPC) {
		t.Errorf("with hint and class: %v", both)
	}
}
