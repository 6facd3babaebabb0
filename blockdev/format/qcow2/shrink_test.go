package qcow2

import (
	"bytes"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// TestShrinkFails: when shrinking fails, at whichever call, the size is what it was, and shrinking
// again works.
func TestShrinkFails(t *testing.T) {
	const cs, clusters, left = 512, 200, 30
	for i := 0; ; i++ {
		img := mustCreate(t, CreateOptions{Size: cs * clusters, ClusterSize: ptr(uint64(cs)), RefcountBits: ptr(int64(64))})
		f := drivertest.NewFault(img)
		s := mustOpen(t, mem{f}, config{unmap: true})
		if err := s.WriteAt(req(), blk.Buf(make([]byte, cs*clusters)), 0, 0); err != nil {
			t.Fatal(err)
		}
		f.FailAt(i, syscall.EIO)
		err := s.Resize(req(), cs*left, blk.PreallocOff)
		struck := f.Failed() > 0
		f.Clear()
		if err != nil {
			if n := s.size.Load(); n != cs*clusters {
				t.Fatalf("call %d: %v, and the size is %d", i, err, n)
			}
			if err := s.Resize(req(), cs*left, blk.PreallocOff); err != nil {
				t.Fatalf("call %d: again: %v", i, err)
			}
		}
		if n := s.size.Load(); n != cs*left {
			t.Fatalf("call %d: the size is %d", i, n)
		}
		mustClose(t, s)
		s = mustOpen(t, mem{img}, config{readOnly: true})
		sound(t, s, true)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if !struck {
			break
		}
	}
}

// TestShrinkKeepsWhatIsNotCounted: the file is not cut where data lie that no refcount counts, be
// that known or not, also after there was no space and it was given up to find that out.
func TestShrinkKeepsWhatIsNotCounted(t *testing.T) {
	const cs, clusters, left, data = 512, 1000, 600, 400
	want := make([]byte, cs*data)
	for i := range want {
		want[i] = byte(i>>9) | 1
	}
	for _, c := range []struct{ known, full bool }{{known: true}, {}, {full: true}} {
		known := c.known
		img := mustCreate(t, CreateOptions{Size: cs * clusters, ClusterSize: ptr(uint64(cs))})
		s := mustOpen(t, mem{img}, config{})
		if err := s.WriteAt(req(), blk.Buf(want), 0, 0); err != nil {
			t.Fatal(err)
		}
		table := int64(peek(s).l1.at(1) & layout.OffsetMask)
		mustClose(t, s)
		if known {
			img.Poke(int64(peek(s).hdr.RefcountTableOffset)+8, make([]byte, 8)) // no block
		} else {
			img.Poke(int64(peek(s).reft[1]), make([]byte, cs))
		}
		times := 0
		s = mustOpen(t, unreadable{mem{img}, table, table + cs, &times}, config{unmap: true})
		if !known {
			times = 1 << 30 // so that it is not known what the image refers to
		}
		if c.full {
			surveyTooLarge(s, s.geo.Clusters(img.Size()))
			if !s.giveSpace(req(), syscall.ENOSPC) {
				t.Fatal("there is no space")
			}
		}
		if err := s.Resize(req(), cs*left, blk.PreallocOff); err != nil {
			t.Fatal(err)
		}
		if (peek(s).survey == nil) != (known || c.full) {
			t.Fatalf("a survey is under way: %v, want %v", peek(s).survey != nil, !known)
		}
		times = 0
		got := make([]byte, len(want))
		if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%+v: the data are gone: %v", c, err)
		}
		_ = s.Close()
	}
}
