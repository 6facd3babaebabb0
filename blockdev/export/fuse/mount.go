package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
)

// mountType is the type of our mounts; the kernel knows what stands before the dot.
const mountType = "fuse.qblockd"

// errMount is all that clients are told: QEMU's text.
var errMount = errors.New("Failed to mount FUSE session to export")

// mount is a file that is mounted over another one.
type mount struct {
	path   string // resolved and absolute
	dev    int    // /dev/fuse, with the connection
	place  place  // where it is
	helper bool   // fusermount3 has mounted it, and must unmount it
}

// checkMountpoint resolves the path of a mountpoint, which must be a regular file; a mount of ours
// there whose daemon has died is taken away. It blocks as long as the file system does.
func checkMountpoint(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil || path == "" {
		return "", blk.Errnof(syscall.ENOENT, "Failed to stat '%s'", path)
	}
	var st unix.Stat_t
	err = unix.Stat(abs, &st)
	for err == unix.ENOTCONN && dropStale(abs) {
		err = unix.Stat(abs, &st)
	}
	if err != nil {
		return "", blk.Errnof(err, "Failed to stat '%s'", path)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", fmt.Errorf("'%s' is not a regular file", path)
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", blk.Errnof(err, "Failed to stat '%s'", path)
	}
	return abs, nil
}

// dropStale unmounts a file whose daemon, one of ours, has died.
func dropStale(path string) bool {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return false
	}
	path = filepath.Join(dir, filepath.Base(path))
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || topMount(table, path) != mountType {
		return false
	}
	if unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
		return true
	}
	return runHelper("-u", "-z", "--", path) == nil
}

// topMount is the type of what is mounted at path last, by a table of mounts.
func topMount(table []byte, path string) (typ string) {
	for line := range bytes.Lines(table) {
		mounted, source, ok := strings.Cut(string(line), " - ")
		f := strings.Fields(mounted)
		if ok && len(f) >= 5 && unescape(f[4]) == path {
			typ, _, _ = strings.Cut(source, " ")
		}
	}
	return typ
}

// unescape takes the octal escapes out of a path in a table of mounts.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// newMount mounts the file of a new connection over the regular file at path, by fusermount3 if we
// may not do that ourselves. No request is sent: the kernel keeps them until INIT is answered.
func newMount(path string, allowOther bool) (*mount, error) {
	options := "default_permissions,max_read=" + strconv.FormatInt(maxRead(), 10)
	if allowOther {
		options += ",allow_other"
	}
	m := &mount{path: path}
	var err error
	if m.dev, err = mountDirect(path, options); err == unix.EPERM || err == unix.EACCES {
		m.helper = true
		m.dev, err = mountByHelper(path, options)
	}
	if err != nil {
		return nil, fmt.Errorf("mounting %s: %w", path, err)
	}
	m.place = placeAt(path)
	m.readAhead()
	return m, nil
}

// mountDirect opens a connection and mounts its file.
func mountDirect(path, options string) (dev int, err error) {
	if dev, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return -1, err
	}
	who := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,", dev, unix.S_IFREG, os.Getuid(), os.Getgid())
	if err = unix.Mount("qblockd", path, mountType, unix.MS_NOSUID|unix.MS_NODEV, who+options); err != nil {
		unix.Close(dev)
		return -1, err
	}
	return dev, nil
}

// readAhead lets the kernel read ahead as much as one request can take, and not the usual 128 KiB,
// if we have the right to; INIT must not have been answered yet.
func (m *mount) readAhead() {
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", m.place.major, m.place.minor)
	_ = os.WriteFile(path, strconv.AppendInt(nil, maxData>>10, 10), 0)
}

// place tells mounts apart.
type place struct {
	id           uint64 // the kernel's number of the mount; used again before Linux 6.8
	major, minor uint32 // of the device of the file system
}

// placeAt is the mount at path. It asks nobody who serves a file system.
func placeAt(path string) place {
	var st unix.Statx_t
	const flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	if unix.Statx(unix.AT_FDCWD, path, flags, unix.STATX_MNT_ID_UNIQUE|unix.STATX_MNT_ID, &st) != nil {
		return place{}
	}
	return place{st.Mnt_id, st.Dev_major, st.Dev_minor}
}

// unmount takes the mount away; it is no error if somebody else has done so. Requests that are
// under way and all later ones fail, with fusermount3 only when nobody has the file open any more.
func (m *mount) unmount() error {
	switch {
	case placeAt(m.path) != m.place:
		return m.covered()
	case m.helper:
		return runHelper("-u", "-z", "--", m.path)
	}
	return unix.Unmount(m.path, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// covered is an error if the mount is there, below another one.
func (m *mount) covered() error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	dev := fmt.Sprintf("%d:%d", m.place.major, m.place.minor)
	for line := range bytes.Lines(table) {
		if f := strings.Fields(string(line)); len(f) >= 5 && f[2] == dev && unescape(f[4]) == m.path {
			return errors.New("something else is mounted over it")
		}
	}
	return nil
}

// runHelper runs fusermount3, for users who may not mount by themselves.
func runHelper(args ...string) error {
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// mountByHelper lets fusermount3 mount, and takes the descriptor of the connection from it.
func mountByHelper(path, options string) (int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "fusermount3")
	cmd := exec.Command("fusermount3", "-o", options+",fsname=qblockd,subtype=qblockd", "--", path)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	out, err := cmd.CombinedOutput()
	theirs.Close()
	if err != nil {
		return -1, fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err == nil && len(msgs) == 1 {
		if fds, err := unix.ParseUnixRights(&msgs[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, errors.New("fusermount3 has sent no descriptor")
}
