package qcow2

import (
	"testing"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// TestStatusOfHugeDisks: where there are no L2 tables a disk is told of in one step up to the next
// one, and discarded, however large it is.
func TestStatusOfHugeDisks(t *testing.T) {
	const size = int64(1) << 55
	f := mustCreate(t, CreateOptions{Size: uint64(size), ClusterSize: ptr(uint64(2 << 20))})
	s := mustOpen(t, mem{f}, config{})
	defer mustClose(t, s)
	if x, err := s.Status(req(), 0, size); err != nil || x.N != size || x.Allocated {
		t.Errorf("empty: %+v, %v", x, err)
	}
	const at = int64(3)<<50 + 5<<21
	if err := s.writeAt(req(), blk.Buf(make([]byte, 1<<21)), at, 0); err != nil {
		t.Fatal(err)
	}
	calls := 0
	allocated := int64(0)
	for off := int64(0); off < size; calls++ {
		x, err := s.Status(req(), off, size-off)
		if err != nil {
			t.Fatal(err)
		}
		if x.Allocated {
			allocated += x.N
		}
		off += x.N
	}
	if calls > 4+int(s.cs/peek(s).slice) || allocated != 1<<21 {
		t.Errorf("%d calls for one cluster, %d bytes allocated", calls, allocated)
	}
	if err := s.Discard(req(), 0, size); err != nil {
		t.Fatal(err)
	}
	if x, err := s.Status(req(), at, 1<<21); err != nil || x.Data {
		t.Errorf("discarded: %+v, %v", x, err)
	}
}

// TestStatusOfOneTableForAll: an image that uses one L2 table for all of a huge disk does not make
// one call look into it as often.
func TestStatusOfOneTableForAll(t *testing.T) {
	const size = int64(1) << 55
	f := mustCreate(t, CreateOptions{Size: uint64(size), ClusterSize: ptr(uint64(2 << 20))})
	s := mustOpen(t, mem{f}, config{})
	defer mustClose(t, s)
	if err := s.Zero(req(), 0, 1<<39, 0); err != nil {
		t.Fatal(err)
	}
	e := peek(s).l1.at(0)
	for i := range int64(peek(s).hdr.L1Size) {
		peek(s).l1.set(i, e&^layout.Copied)
	}
	x, err := s.Status(req(), 0, size)
	if want := (maxJoined + 1) * peek(s).slice / 8 << s.cb; err != nil || x.N != want || !x.Zero {
		t.Errorf("%+v, %v, want %d bytes of zeroes", x, err, want)
	}
	for i := range int64(peek(s).hdr.L1Size) {
		peek(s).l1.set(i, 0)
	}
	peek(s).l1.set(0, e)
}
