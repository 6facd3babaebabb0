package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// readyEnv carries the number of the pipe on which a daemonized child reports that it is up.
const readyEnv = "QBLOCKD_READY_FD"

// daemonize starts the program again as a session leader of its own and exits: with 0 once the
// child reports that all options have taken effect, with 1 if it ends before. In the child it
// returns the function that reports. A Go process cannot fork without exec, so the child scans the
// command line anew.
func daemonize() (ready func(), err error) {
	if text := os.Getenv(readyEnv); text != "" {
		fd, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", readyEnv, err)
		}
		os.Unsetenv(readyEnv)
		unix.CloseOnExec(fd)
		return func() { detach(fd) }, nil
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	files := inheritedFiles()
	files = append(files, uintptr(pipe[1]))
	pid, err := syscall.ForkExec(exe, os.Args, &syscall.ProcAttr{
		Env:   append(os.Environ(), fmt.Sprintf("%s=%d", readyEnv, len(files)-1)),
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	unix.Close(pipe[1])
	var status [1]byte
	if n, _ := os.NewFile(uintptr(pipe[0]), "ready").Read(status[:]); n == 1 {
		os.Exit(0)
	}
	var ws syscall.WaitStatus
	_, _ = syscall.Wait4(pid, &ws, 0, nil)
	os.Exit(1)
	return nil, nil
}

// inheritedFiles maps each descriptor that this process was started with to itself, so that
// numbers on the command line (fd=N) mean the same in the child.
func inheritedFiles() []uintptr {
	const closed = ^uintptr(0)
	files := []uintptr{0, 1, 2}
	names, _ := filepath.Glob("/proc/self/fd/*")
	for _, name := range names {
		fd, err := strconv.Atoi(filepath.Base(name))
		if err != nil || fd < 3 {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue
		}
		for len(files) <= fd {
			files = append(files, closed)
		}
		files[fd] = uintptr(fd)
	}
	return files
}

// detach gives up the terminal and the directory and tells the waiting parent.
func detach(fd int) {
	_ = os.Chdir("/")
	if null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		for std := 0; std <= 2; std++ {
			_ = unix.Dup3(null, std, 0)
		}
		unix.Close(null)
	}
	_, _ = unix.Write(fd, []byte{0})
	unix.Close(fd)
}
