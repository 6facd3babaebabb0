package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// TestSearchBehindTheEnd: an image of 8 MiB whose table names one full block of refcounts a million
// times has no free cluster for long. That is found out at once, and not after 2^31 clusters.
func TestSearchBehindTheEnd(t *testing.T) {
	const cs, table = 4096, 8 << 20
	img := mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(cs))}).Bytes()
	block := int64(len(img)+cs-1) / cs * cs
	big := make([]byte, block+cs+table)
	copy(big, img)
	for i := block; i < block+cs; i += 2 {
		big[i+1] = 1
	}
	for i := block + cs; i < int64(len(big)); i += 8 {
		binary.BigEndian.PutUint64(big[i:], uint64(block))
	}
	binary.BigEndian.PutUint64(big[48:], uint64(block+cs))
	binary.BigEndian.PutUint32(big[56:], table/cs)
	s := mustOpen(t, mem{drivertest.MemFileOf(big)}, config{})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, _, _, err := s.findFree(&blk.Req{Ctx: ctx}, 0, 1, 1); !errors.Is(err, errTooBig) {
		t.Errorf("free cluster: %v", err)
	}
}

// TestSearchGoesOn: what a search for free clusters passes over, the next ones find.
func TestSearchGoesOn(t *testing.T) {
	defer func(n int64) { mostSearched = n }(mostSearched)
	mostSearched = 16
	const cs = 512
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(cs))})}, config{})
	defer mustClose(t, s)
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 600*cs)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(req(), 400*cs, 8*cs); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(req()); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	end := s.geo.Clusters(s.fileEnd)
	s.freeIdx = 0 // as after opening
	s.mu.Unlock()
	within := 0
	for i := range int64(64) {
		s.mu.Lock()
		c, _, err := s.allocate(req(), 1, 1, "a cluster")
		s.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 && c < end {
			t.Errorf("the first search has found cluster %d, and looked at more than %d", c, mostSearched)
		}
		if c < end {
			within++
		}
	}
	if within != 8 {
		t.Errorf("%d clusters in the file were found, want 8", within)
	}
}
