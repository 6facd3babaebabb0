package file

import (
	"testing"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// BenchmarkRequests measures 4 KiB requests, one at a time and from many callers.
func BenchmarkRequests(b *testing.B) {
	dir := b.TempDir()
	for _, w := range []struct {
		name   string
		direct bool
		aio    types.BlockdevAioOptions
	}{
		{"threads", false, "threads"}, {"threads-direct", true, "threads"},
		{"uring-direct", true, "io_uring"}, {"native-direct", true, "native"},
	} {
		name := dir + "/" + w.name
		d, err := openDisk(bg.Ctx, settings{name: mustFile(b, dir, w.name, 1<<20), driver: "file", direct: w.direct})
		if err == nil {
			err = d.setAio(&types.BlockdevOptionsFile{Aio: &w.aio})
		}
		if err != nil {
			b.Logf("%s: %v", name, err)
			continue
		}
		defer d.Close()
		p := pattern(1<<20, 1)
		if err := d.WriteAt(bg, blk.Buf(p), 0, blk.FUA); err != nil {
			b.Fatal(err)
		}
		v := blk.Buf(p[:4096])
		run := func(op string, f func(off int64) error) {
			b.Run(w.name+"/"+op, func(b *testing.B) {
				b.SetBytes(4096)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if err := f(int64(i%256) * 4096); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		if !w.direct {
			nw := &blk.Req{NoWait: true}
			run("inline-read", func(off int64) error { return d.ReadAt(nw, v, off, 0) })
		}
		run("read", func(off int64) error { return d.ReadAt(bg, v, off, 0) })
		b.Run(w.name+"/read-many", func(b *testing.B) {
			b.SetBytes(4096)
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				v := blk.Buf(buf(4096))
				for i := 0; pb.Next(); i++ {
					if err := d.ReadAt(bg, v, int64(i%256)*4096, 0); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		run("write", func(off int64) error { return d.WriteAt(bg, v, off, 0) })
	}
}
