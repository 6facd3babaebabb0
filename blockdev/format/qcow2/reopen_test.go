package qcow2

import (
	"context"
	"fmt"
	"testing"
	"time"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestReopenForgetsTables: the L2 tables of snapshots that overlap-check=all looks at are
// forgotten when it ends, or does not begin. Their clusters are used for other things, such as
// bitmaps, and given back.
func TestReopenForgetsTables(t *testing.T) {
	for _, aborted := range []bool{false, true} {
		t.Run(fmt.Sprint("aborted=", aborted), func(t *testing.T) {
			all, none := checks(types.Qcow2OverlapCheckModeAll), checks(types.Qcow2OverlapCheckModeNone)
			k := &memKeeper{}
			c := config{keeper: k, options: all}
			if aborted {
				c.options = none
			}
			s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: 1 << 20, ClusterSize: ptr(uint64(512))})}, c)
			write := func() {
				if err := s.WriteAt(req(), blk.Buf(make([]byte, 64<<10)), 0, 0); err != nil {
					t.Fatal(err)
				}
			}
			write()
			id, err := s.CreateSnapshot(req(), "s", time.Unix(1, 0), 0)
			if err != nil {
				t.Fatal(err)
			}
			write() // which gives the disk tables of its own
			o := &none
			if aborted {
				o = &all
			}
			o.CacheCleanInterval = ptr(int64(0))
			re, err := s.reconfigure(o, false)
			if err == nil {
				err = re.Prepare(context.Background())
			}
			if err != nil {
				t.Fatal(err)
			}
			if aborted {
				re.Abort()
			} else {
				re.Commit()
			}
			if err := s.DeleteSnapshot(req(), id, "s"); err != nil {
				t.Fatal(err)
			}
			for i := range 16 {
				p := persisted{name: fmt.Sprint(i), bits: bitmap.New(1<<20, 512), enabled: true}
				k.list = append(k.list, p)
				if err := s.HoldBitmap(req(), p.name); err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range k.list {
				if err := s.RemoveBitmap(req(), p.name); err != nil {
					t.Fatal(err)
				}
			}
			k.list = nil
			if err := s.Flush(req()); err != nil {
				t.Fatal(err)
			}
			sound(t, s, false)
			mustClose(t, s)
		})
	}
}
