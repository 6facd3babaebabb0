package file

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	"golang.org/x/sys/unix"

	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// The first lock byte of the used and of the unshared permissions. Byte 0 is libvirt's.
const (
	usedBase     = 100
	unsharedBase = 200
)

// lockBits lists the permissions in the order of their lock bytes with the words of lock errors.
var lockBits = [...]struct {
	p    perm.Perm
	name string
}{
	{perm.ConsistentRead, "consistent read"},
	{perm.Write, "write"},
	{perm.WriteUnchanged, "write unchanged"},
	{perm.Resize, "resize"},
}

// lockSet is a set of lock bytes: those of used permissions and those of permissions that
// are not shared.
type lockSet struct{ used, unshared perm.Perm }

// locksFor are the lock bytes that a claim on a node holds.
func locksFor(c perm.Claim) lockSet {
	return lockSet{c.Need & perm.All, perm.All &^ c.Share}
}

func (a lockSet) union(b lockSet) lockSet { return lockSet{a.used | b.used, a.unshared | b.unshared} }
func (a lockSet) minus(b lockSet) lockSet {
	return lockSet{a.used &^ b.used, a.unshared &^ b.unshared}
}
func (a lockSet) empty() bool { return a == lockSet{} }

// lockByte is one of a lockSet.
type lockByte struct {
	off      int64
	opposite int64  // locked by who does not allow this one
	msg      string // if somebody has that
}

// bytes are the lock bytes in the set, used ones first.
func (a lockSet) bytes() (l []lockByte) {
	for i, b := range lockBits {
		if a.used&b.p != 0 {
			l = append(l, lockByte{usedBase + int64(i), unsharedBase + int64(i), `Failed to get "` + b.name + `" lock`})
		}
	}
	for i, b := range lockBits {
		if a.unshared&b.p != 0 {
			msg := `Failed to get shared "` + b.name + `" lock`
			l = append(l, lockByte{unsharedBase + int64(i), usedBase + int64(i), msg})
		}
	}
	return l
}

// lockError words a failed lock call; that somebody else has the byte goes without saying why.
func lockError(err error, msg string) error {
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) {
		return blk.Text(msg, err)
	}
	return blk.Errnof(err, "%s", msg)
}

// lockBytes takes shared locks on the bytes of s.
func lockBytes(fd int, s lockSet) error {
	for _, b := range s.bytes() {
		if err := setLock(fd, unix.F_RDLCK, b.off, 1); err != nil {
			return lockError(err, fmt.Sprintf("Failed to lock byte %d", b.off))
		}
	}
	return nil
}

// unlockBytes gives the bytes of s back. All are tried; the first error is returned, which
// only a broken network file system can cause.
func unlockBytes(fd int, s lockSet) (first error) {
	for _, b := range s.bytes() {
		if err := setLock(fd, unix.F_UNLCK, b.off, 1); err != nil && first == nil {
			first = blk.Errnof(err, "Failed to unlock byte %d", b.off)
		}
	}
	return first
}

// probeBytes fails if another open file description has a lock that contradicts s, whose own bytes
// are locked: it does not share what s uses, or uses what s does not share.
func probeBytes(fd int, s lockSet) error {
	for _, b := range s.bytes() {
		if err := testLock(fd, b.opposite); err != nil {
			return lockError(err, b.msg)
		}
	}
	return nil
}

// takeLocks raises what fd holds from held to held+want and probes for want. On failure
// the new bytes are given back.
func takeLocks(fd int, held, want lockSet, name string) error {
	extra := want.minus(held)
	err := lockBytes(fd, extra)
	if err == nil {
		if err = probeBytes(fd, want); err == nil {
			return nil
		}
		err = blk.WithHint(err, "Is another process using the image ["+name+"]?")
	}
	_ = unlockBytes(fd, extra) // less locked is less in the way; err is the news
	return err
}

// setLock sets or clears an open file description lock.
func setLock(fd int, typ int16, off, n int64) error {
	fl := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: off, Len: n}
	return again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &fl) })
}

// testLock is EAGAIN if an exclusive lock on the byte could not be had.
func testLock(fd int, off int64) error {
	fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: 1}
	err := again(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &fl) })
	if err == nil && fl.Type != unix.F_UNLCK {
		err = unix.EAGAIN
	}
	return err
}
