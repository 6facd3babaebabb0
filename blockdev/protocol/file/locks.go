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

// bytes calls f with the offset of each lock byte in the set, used ones first, until it fails.
func (a lockSet) bytes(f func(off int64) error) error {
	for i, b := range lockBits {
		if a.used&b.p != 0 {
			if err := f(usedBase + int64(i)); err != nil {
				return err
			}
		}
	}
	for i, b := range lockBits {
		if a.unshared&b.p != 0 {
			if err := f(unsharedBase + int64(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// probe is a byte that must not be locked by anybody else, and the message if it is.
type probe struct {
	off int64
	msg string
}

// probes are the questions to ask after the set's own bytes are locked: does somebody
// refuse to share what we use, does somebody use what we do not share.
func (a lockSet) probes() []probe {
	var ps []probe
	for i, b := range lockBits {
		if a.used&b.p != 0 {
			ps = append(ps, probe{unsharedBase + int64(i), `Failed to get "` + b.name + `" lock`})
		}
	}
	for i, b := range lockBits {
		if a.unshared&b.p != 0 {
			ps = append(ps, probe{usedBase + int64(i), `Failed to get shared "` + b.name + `" lock`})
		}
	}
	return ps
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
	return s.bytes(func(off int64) error {
		if err := setLock(fd, unix.F_RDLCK, off, 1); err != nil {
			return lockError(err, fmt.Sprintf("Failed to lock byte %d", off))
		}
		return nil
	})
}

// unlockBytes gives the bytes of s back. All are tried; the first error is returned, which
// only a broken network file system can cause.
func unlockBytes(fd int, s lockSet) error {
	var first error
	_ = s.bytes(func(off int64) error {
		if err := setLock(fd, unix.F_UNLCK, off, 1); err != nil && first == nil {
			first = blk.Errnof(err, "Failed to unlock byte %d", off)
		}
		return nil
	})
	return first
}

// probeBytes fails if another open file description has a lock that contradicts s.
func probeBytes(fd int, s lockSet) error {
	for _, p := range s.probes() {
		if err := testLock(fd, p.off); err != nil {
			return lockError(err, p.msg)
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
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &fl)
		if err != unix.EINTR {
			return err
		}
	}
}

// testLock is EAGAIN if an exclusive lock on the byte could not be had.
func testLock(fd int, off int64) error {
	fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: 1}
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &fl)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case fl.Type != unix.F_UNLCK:
			return unix.EAGAIN
		}
		return nil
	}
}
