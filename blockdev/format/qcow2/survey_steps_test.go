package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// unreadable is a file a part of which cannot be read, the first so many times.
type unreadable struct {
	mem
	off, end int64
	times    *int
}

func (f unreadable) ReadAt(r *blk.Req, v blk.Vec, off int64, fl blk.Flags) error {
	if *f.times > 0 && off < f.end && f.off < off+v.Len() {
		*f.times--
		return syscall.EIO
	}
	return f.mem.ReadAt(r, v, off, fl)
}

// TestOverwritingWhileTheSurveyGoesOn: what is overwritten in place before all references are
// counted has no other one as far as is known, and is in no metadata.
func TestOverwritingWhileTheSurveyGoesOn(t *testing.T) {
	const cs, victim = 512, 130
	o := CreateOptions{ClusterSize: ptr(uint64(cs))}
	sound := sample(t, o)
	s := mustOpen(t, mem{sound}, config{readOnly: true})
	entry := int64(peek(s).l1.at(victim/64)&layout.OffsetMask) + victim%64*8
	old, err := s.readTable(req(), int64(peek(s).snaps[0].L1TableOffset), 1)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	m, err := s.lookup(req(), 2*cs, cs)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	places := map[string]uint64{
		"data": uint64(m.host), "L2 table of a snapshot": old.at(0) & layout.OffsetMask,
		"L1 table of a snapshot": peek(s).snaps[0].L1TableOffset,
	}
	mustClose(t, s)
	for what, off := range places {
		img := drivertest.MemFileOf(sound.Bytes())
		img.Poke(entry, be.AppendUint64(nil, off|layout.Copied))
		before := img.Bytes()[off : off+cs]
		s := mustOpen(t, mem{img}, config{vetSteps: [2]int64{1, 1}})
		if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, cs)), victim*cs, 0); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v", what, err)
		}
		if !bytes.Equal(img.Bytes()[off:off+cs], before) {
			t.Errorf("%s is overwritten", what)
		}
		_ = s.Inactivate(req())
		s.Close()
	}
}

// TestOverwritingEndsTheSurvey: also who never changes metadata gets to the end of it.
func TestOverwritingEndsTheSurvey(t *testing.T) {
	const cs = 512
	img := sample(t, CreateOptions{ClusterSize: ptr(uint64(cs))})
	s := mustOpen(t, mem{img}, config{vetSteps: [2]int64{1, 1}})
	for n := 0; peek(s).survey != nil; n++ {
		if n > 64 {
			t.Fatal("it goes on and on")
		}
		if err := s.WriteAt(req(), blk.Buf(make([]byte, cs)), 100*cs, 0); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
}

// TestSurveyOfManySmallTables: a table of bits counts as what it holds, not as the cluster that it
// lies in. An image may have thousands of them.
func TestSurveyOfManySmallTables(t *testing.T) {
	const cs = 2 << 20
	img := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(cs))})
	k := &memKeeper{}
	s := mustOpen(t, mem{img}, config{keeper: k})
	for i := range maxSurvey/cs + 8 {
		name := fmt.Sprint("b", i)
		k.list = append(k.list, persisted{name: name, bits: bitmap.New(1<<20, 1<<16), enabled: true})
		if err := s.HoldBitmap(req(), name); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, s)
	s = mustOpen(t, mem{img}, config{keeper: &memKeeper{}})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if peek(s).survey != nil {
		t.Errorf("the survey is not over: %+v", peek(s).survey)
	}
	mustClose(t, s)
}

// TestOverwritingBesideBadSectors: a part of its table that cannot be read does not concern a write
// in place.
func TestOverwritingBesideBadSectors(t *testing.T) {
	const last = 1 << 30
	img := mustCreate(t, CreateOptions{Size: 3 << 29})
	s := mustOpen(t, mem{img}, config{})
	for off := int64(0); off <= last; off += 1 << 29 {
		if err := s.WriteAt(req(), blk.Buf(make([]byte, 64<<10)), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	bad := int64(peek(s).l1.at(2)&layout.OffsetMask) + 32<<10
	mustClose(t, s)
	left := 1 << 30
	options := Options{L2CacheEntrySize: ptr(int64(4096))}
	s = mustOpen(t, unreadable{mem{img}, bad, bad + 512, &left}, config{vetSteps: [2]int64{1, 1}, options: options})
	for range 6 {
		if err := s.WriteAt(req(), blk.Buf(make([]byte, 4096)), last, 0); err != nil {
			t.Error(err)
		}
	}
	if left == 1<<30 {
		t.Error("nobody has read there")
	}
	left = 0
	mustClose(t, s)
}

// TestSurveyMeetsBadSectors: what cannot be read fails no request that does not need it.
func TestSurveyMeetsBadSectors(t *testing.T) {
	const cs = 512
	img := sample(t, CreateOptions{ClusterSize: ptr(uint64(cs))})
	s := mustOpen(t, mem{img}, config{readOnly: true})
	places := map[string]int64{
		"L2 table":               int64(peek(s).l1.at(1) & layout.OffsetMask),
		"L1 table of a snapshot": int64(peek(s).snaps[0].L1TableOffset),
	}
	mustClose(t, s)
	for what, off := range places {
		for _, times := range []int{1, 2, 1 << 30} {
			t.Run(fmt.Sprint(what, ", ", times), func(t *testing.T) {
				left, img := 0, drivertest.MemFileOf(bytes.Clone(img.Bytes()))
				s := mustOpen(t, unreadable{mem{img}, off, off + cs, &left}, config{vetSteps: [2]int64{1, 1}})
				left = times
				for c := range int64(20) {
					if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{7}, cs)), c*cs, 0); err != nil {
						t.Errorf("write %d: %v", c, err)
					}
					if err := s.Discard(req(), (30+c)*cs, cs); err != nil {
						t.Errorf("discard %d: %v", 30+c, err)
					}
				}
				if err := s.Flush(req()); err != nil {
					t.Errorf("flush: %v", err)
				}
				if left == times {
					t.Error("nobody has read there")
				}
				left = 0
				b := make([]byte, 20*cs)
				if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{7}, len(b))) {
					t.Errorf("read: %v, begins with %d", err, b[0])
				}
				sound(t, s, true)
				mustClose(t, s)
			})
		}
	}
}
