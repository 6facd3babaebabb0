package null

import (
	"context"
	"errors"
	"math"
	"testing"
	"time"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

func TestOpen(t *testing.T) {
	for _, c := range []struct {
		name    string
		size    int64
		latency uint64
		want    int64
		err     string
	}{
		{"rounded up", 1000, 0, 1024, ""},
		{"empty", 0, 0, 0, ""},
		{"largest", blk.MaxSize, 0, blk.MaxSize, ""},
		{"too large", math.MaxInt64, 0, 0, "Could not refresh total sector count: File too large"},
		{"negative", -1, 0, 0, "Parameter 'size' expects a non-negative number below 2^64"},
		{"latency", 512, math.MaxUint64, 0, "latency-ns is invalid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := open(&driver.Opening{}, &types.BlockdevOptionsNull{Size: &c.size, LatencyNs: &c.latency})
			switch {
			case c.err != "" && (err == nil || err.Error() != c.err):
				t.Errorf("error %v", err)
			case c.err == "" && (err != nil || d.Size() != c.want):
				t.Errorf("size %d, error %v", d.Size(), err)
			}
		})
	}
	if d, err := open(&driver.Opening{}, &types.BlockdevOptionsNull{}); err != nil || d.Size() != 1<<30 {
		t.Errorf("default: %v, %v", d.Size(), err)
	}
}

func TestLatency(t *testing.T) {
	ns := uint64(time.Hour)
	d, err := open(&driver.Opening{}, &types.BlockdevOptionsNull{LatencyNs: &ns})
	if err != nil {
		t.Fatal(err)
	}
	v := blk.Buf(make([]byte, 512))
	if err := d.ReadAt(&blk.Req{NoWait: true}, v, 0, 0); err != blk.ErrWouldBlock {
		t.Errorf("no wait: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.ReadAt(&blk.Req{Ctx: ctx}, v, 0, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestReadZeroes(t *testing.T) {
	for _, zeroes := range []bool{false, true} {
		d, err := open(&driver.Opening{}, &types.BlockdevOptionsNull{ReadZeroes: &zeroes})
		if err != nil {
			t.Fatal(err)
		}
		b := []byte{1}
		r := &blk.Req{}
		if err := d.ReadAt(r, blk.Buf(b), 0, 0); err != nil || (b[0] == 0) != zeroes {
			t.Errorf("read-zeroes %v: read %d, %v", zeroes, b[0], err)
		}
		if x, err := d.(graph.BlockStatuser).Status(r, 7, 100); err != nil || x.Zero != zeroes || x.N != 100 || x.Data {
			t.Errorf("read-zeroes %v: status %+v, %v", zeroes, x, err)
		}
	}
}
