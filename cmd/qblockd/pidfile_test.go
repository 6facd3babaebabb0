package main

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPidFileThatCannotBeWritten: it is not left behind.
func TestPidFileThatCannotBeWritten(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 0, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "pid")
	_, err := writePidFile(path)
	if e := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); e != nil {
		t.Fatal(e)
	}
	if err == nil || err.Error() != "cannot create PID file: Failed to write pid file: File too large" {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("it is still there: %v", err)
	}
}
