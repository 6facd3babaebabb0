package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// TestGrowFailsGivesBack: a disk that cannot become larger keeps none of the space, neither of its
// file nor of its data file, and can be made larger afterwards.
func TestGrowFailsGivesBack(t *testing.T) {
	for _, m := range []blk.Prealloc{blk.PreallocMetadata, blk.PreallocFalloc, blk.PreallocFull} {
		for _, sh := range []shape{{v: "v3", bits: 16}, {v: "v2", bits: 16}, {v: "v3", bits: 64}, {v: "v3", bits: 16, data: "data"}} {
			t.Run(fmt.Sprintf("%s,%+v", m, sh), func(t *testing.T) {
				sh.cs = 512
				i := 0
				for failsToGrow(t, sh, m, i) {
					i++
				}
				if i == 0 {
					t.Error("nothing has failed")
				}
			})
		}
	}
}

// failsToGrow has the I/O with number i fail while an image of shape sh grows; false: it did not
// fail to grow.
func failsToGrow(t *testing.T, sh shape, m blk.Prealloc, i int) bool {
	t.Helper()
	const old, size = 20 * 512, 420 * 512
	o := sh.options(old)
	img := mustCreate(t, o)
	c, f := config{}, drivertest.NewFault(img)
	if o.Data != nil {
		c.external = mem{o.Data}
	}
	s := mustOpen(t, mem{f}, c)
	defer mustClose(t, s)
	disk := make([]byte, size)
	fill(rand.New(rand.NewPCG(uint64(i), 1)), disk[:old])
	if err := s.WriteAt(req(), blk.Buf(disk[:old]), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(req()); err != nil {
		t.Fatal(err)
	}
	had := inUse(t, s)
	f.FailAt(i, syscall.ENOSPC)
	err := s.Resize(req(), size, m)
	f.Clear()
	if err == nil {
		return false
	}
	// An L1 table, and what counts clusters, may stay; all of it if the size was the last to fail.
	sized := strings.HasPrefix(err.Error(), "Failed to update the image size")
	if n := inUse(t, s); s.dead.Load() || s.size.Load() != old || n > had+10 && !sized {
		t.Fatalf("failure %d (%v): given up %v, %d clusters in place of %d", i, err, s.dead.Load(), n, had)
	}
	if o.Data != nil && o.Data.Size() != old && !sized {
		t.Fatalf("failure %d (%v): the data file has %d bytes", i, err, o.Data.Size())
	}
	sound(t, s, false)
	if err := s.Resize(req(), size, m); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if err := s.ReadAt(req(), blk.Buf(b), 0, 0); err != nil || !bytes.Equal(b, disk) {
		t.Fatalf("failure %d: the disk is another: %v", i, err)
	}
	return true
}

// inUse counts the clusters of s that have a refcount.
func inUse(t *testing.T, s *image) (n int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.geo.Clusters(s.end()) {
		v, err := s.refcount(req(), c)
		if err != nil {
			t.Fatal(err)
		}
		if v > 0 {
			n++
		}
	}
	return n
}
