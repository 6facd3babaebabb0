package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
)

// fullDevice is a file that has one length, and held other things before.
type fullDevice struct{ mem }

func (d fullDevice) Caps() graph.Caps {
	c := d.mem.Caps()
	c.ZeroInit = false
	return c
}

func (d fullDevice) Resize(_ context.Context, size int64, _ bool, m blk.Prealloc) error {
	if m != blk.PreallocOff || size > d.Size() {
		return blk.ErrNotSupported
	}
	return nil
}

// readsZero fails the test unless the disk reads as zeroes from off on.
func readsZero(t *testing.T, s *image, off int64) {
	t.Helper()
	b := make([]byte, s.size.Load()-off)
	if err := s.ReadAt(req(), blk.Buf(b), off, 0); err != nil || !blk.IsZero(b) {
		t.Errorf("from %d on: %v, zeroes %v", off, err, blk.IsZero(b))
	}
}

// TestPreallocateOnDevice: the clusters of a disk are given places on a device that is full of
// something else, for a new image and for one that grows; what cannot be is refused.
func TestPreallocateOnDevice(t *testing.T) {
	for _, o := range []CreateOptions{{}, {Version: "v2"}, {Extended: true}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			f := fullDevice{mem{drivertest.MemFileOf(bytes.Repeat([]byte{0xaa}, 16<<20))}}
			o.Size, o.Preallocation = 2<<20, blk.PreallocMetadata
			if err := createWith(req(), f, nil, "", o.schema(), words); err != nil {
				t.Fatal(err)
			}
			s := mustOpen(t, f, config{})
			readsZero(t, s, 0)
			if err := s.Resize(req(), 4<<20, blk.PreallocMetadata); err != nil {
				t.Fatal(err)
			}
			readsZero(t, s, 0)
			if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{1}, 512)), 3<<20+512, 0); err != nil {
				t.Fatal(err)
			}
			readsZero(t, s, 3<<20+1024)
			if x, err := lookupAt(s, 3<<20); err != nil || x.host == 0 {
				t.Errorf("%+v %v", x, err)
			}
			if err := s.Resize(req(), 6<<20, blk.PreallocFull); !errors.Is(err, blk.ErrNotSupported) {
				t.Errorf("full: %v", err)
			}
			sound(t, s, false)
			mustClose(t, s)
		})
	}
}

// lookupAt is lookup of one byte.
func lookupAt(s *image, off int64) (mapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookup(req(), off, 1)
}

// TestPreallocateOverBacking: what a disk grows by hides a backing file that is longer.
func TestPreallocateOverBacking(t *testing.T) {
	for _, extended := range []bool{false, true} {
		for _, mode := range []blk.Prealloc{blk.PreallocOff, blk.PreallocMetadata, blk.PreallocFull} {
			t.Run(fmt.Sprint(extended, mode), func(t *testing.T) {
				back := mem{drivertest.MemFileOf(bytes.Repeat([]byte{0xbb}, 8<<20))}
				f := mustCreate(t, CreateOptions{Size: 1 << 20, Extended: extended, BackingFile: ptr("b")})
				s := mustOpen(t, mem{f}, config{backing: func() file { return back }})
				if err := s.Resize(req(), 4<<20, mode); err != nil {
					t.Fatal(err)
				}
				readsZero(t, s, 1<<20)
				b := make([]byte, 512)
				if err := s.ReadAt(req(), blk.Buf(b), 1<<20-512, 0); err != nil || b[0] != 0xbb {
					t.Errorf("before the old end: %v %d", err, b[0])
				}
				sound(t, s, false)
				mustClose(t, s)
			})
		}
	}
}

// TestPreallocateEncrypted: an encrypted image of version 2, which has no zero flag, grows by
// zeroes that are written.
func TestPreallocateEncrypted(t *testing.T) {
	for _, o := range []CreateOptions{{Version: "v2"}, {}} {
		o.Size, o.Crypt = 1<<20, "luks"
		s := mustOpen(t, mem{mustCreate(t, o)}, config{})
		if err := s.Resize(req(), 4<<20, blk.PreallocMetadata); err != nil {
			t.Fatal(err)
		}
		readsZero(t, s, 0)
		sound(t, s, false)
		mustClose(t, s)
	}
}
