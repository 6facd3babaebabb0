package budget

import (
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/tests/daemon"
)

// What docs/limits.md states of an open image: so much in any case, so many bytes for each byte
// that the file has on its medium, and for each snapshot and bitmap.
const (
	constant = 96 << 20
	perByte  = 12
	perItem  = 4 << 10
)

// room is what the daemon may map beyond what it maps when it has come up.
const room = 1 << 30

// shapes are images, and whether they may be opened.
var shapes = []struct {
	name  string
	image func(t testing.TB) *image
	want  string // the error of opening it; "" for none
}{
	{"L1 of 2^61 bytes in a hole", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<61)
		i.u64(int64(i.h.L1TableOffset)+int64(i.h.L1Size-1)*8, uint64(i.place(i.cs)))
		return i
	}, ""},
	{"L1 of 8 MiB, each entry another table", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<49)
		at := i.place(0)
		i.h.L1TableOffset = uint64(i.table(int64(i.h.L1Size), func(k int64) uint64 { return uint64(at + (k+1)*i.cs) }))
		return i
	}, ""},
	{"L1 of 32 MiB in a hole, version 2", func(t testing.TB) *image {
		i := newImage(t, 2, 9, 1<<37)
		i.u64(int64(i.h.L1TableOffset)+int64(i.h.L1Size-1)*8, uint64(i.place(i.cs)))
		return i
	}, ""},
	{"L1 longer than the disk needs", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.l1(4 << 20)
		i.u64(int64(i.h.L1TableOffset)+(4<<20-1)*8, uint64(i.place(i.cs)))
		return i
	}, ""},
	{"L1 longer than one may be", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.h.L1Size = 4<<20 + 1
		return i
	}, "Active L1 table too large"},
	{"refcount table of 8 MiB", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		at := i.place(0)
		i.h.RefcountTableClusters = 8 << 20 >> 16
		i.h.RefcountTableOffset = uint64(i.table(1<<20, func(k int64) uint64 {
			if k == 0 {
				return uint64(2 * i.cs)
			}
			return uint64(at + (k+1)*i.cs)
		}))
		return i
	}, ""},
	{"refcount table longer than one may be", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.h.RefcountTableClusters = 8<<20>>16 + 1
		return i
	}, "Reference count table too large"},
	{"65536 snapshots", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.snapshots(65536, 1, 0, int64(i.h.L1TableOffset), 1)
		return i
	}, ""},
	{"65537 snapshots", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.h.NbSnapshots, i.h.SnapshotsOffset = 65537, uint64(i.cs)
		return i
	}, "Snapshot table too large"},
	{"names of snapshots of 64 KiB", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.snapshots(1000, 65535, 0, int64(i.h.L1TableOffset), 1)
		return i
	}, ""},
	{"names of snapshots as long as they are shown", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.snapshots(16000, 255, 0, int64(i.h.L1TableOffset), 1)
		return i
	}, ""},
	{"names of snapshots longer than they may be together", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.snapshots(20000, 300, 0, int64(i.h.L1TableOffset), 1)
		return i
	}, "Snapshot table is too big"},
	{"1 KiB of data that nobody knows in each snapshot", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.snapshots(60000, 1, 1024, int64(i.h.L1TableOffset), 1)
		return i
	}, ""},
	{"snapshots with large L1 tables in one place", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		at := i.place(32 << 20)
		i.u64(at+32<<20-8, uint64(i.place(i.cs)))
		i.snapshots(65536, 1, 0, at, 4<<20)
		return i
	}, ""},
	{"a bitmap of 512 bytes over 2^61 bytes", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<61)
		for k, flags := range []uint32{layout.BitmapInUse, layout.BitmapAuto} {
			e := layout.NewBitmap("", 512, flags)
			e.TableOffset, e.TableSize = uint64(i.place(8)), 1
			i.bitmaps(1+k, 5, e, nil)
		}
		return i
	}, ""},
	{"bitmaps with names of 1 KiB", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		e := layout.NewBitmap("", 65536, layout.BitmapInUse)
		e.TableOffset, e.TableSize = uint64(i.place(8)), 1
		i.bitmaps(4000, 1000, e, nil)
		return i
	}, ""},
	{"3000 bitmaps that hold", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		e := layout.NewBitmap("", 65536, layout.BitmapAuto)
		e.TableSize = 1
		i.bitmaps(3000, 5, e, func(_ int, e *layout.BitmapEntry) { e.TableOffset = uint64(i.place(8)) })
		return i
	}, ""},
	{"tables of bitmaps in one place", func(t testing.TB) *image {
		i := newImage(t, 3, 9, 1<<20)
		e := layout.NewBitmap("", 65536, layout.BitmapAuto)
		e.TableSize = 1 << 20
		at := i.place(8 << 20)
		i.u64(at+8<<20-8, uint64(i.place(i.cs)))
		e.TableOffset = uint64(at)
		i.bitmaps(600, 5, e, nil)
		return i
	}, ""},
	{"bitmaps that are all ones", func(t testing.TB) *image {
		const entries = 1 << 40 / 512 / 8 / 65536
		i := newImage(t, 3, 16, 1<<40)
		e := layout.NewBitmap("", 512, layout.BitmapAuto)
		e.TableSize = entries
		i.bitmaps(64, 5, e, func(_ int, e *layout.BitmapEntry) {
			e.TableOffset = uint64(i.table(entries, func(int64) uint64 { return 1 }))
		})
		return i
	}, ""},
	{"bitmaps that share their data", func(t testing.TB) *image {
		const entries = 1 << 40 / 512 / 8 / 65536
		i := newImage(t, 3, 16, 1<<40)
		e := layout.NewBitmap("", 512, layout.BitmapAuto)
		e.TableSize = entries
		data := i.place(i.cs)
		i.put(data, []byte{0x55})
		i.bitmaps(64, 5, e, func(_ int, e *layout.BitmapEntry) {
			e.TableOffset = uint64(i.table(entries, func(int64) uint64 { return uint64(data) }))
		})
		return i
	}, ""},
	{"more bitmaps than there may be", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.x.Bitmaps = &layout.Bitmaps{NbBitmaps: 1 << 30, DirectorySize: 1 << 30, DirectoryOffset: uint64(i.cs)}
		i.h.AutoclearFeatures = layout.AutoclearBitmaps
		return i
	}, "bitmaps_ext: Image has 1073741824 bitmaps, exceeding the QEMU supported maximum of 65535"},
	{"a directory of bitmaps in a hole", func(t testing.TB) *image {
		i := newImage(t, 3, 16, 1<<20)
		i.x.Bitmaps = &layout.Bitmaps{NbBitmaps: 65535, DirectorySize: 1024 * 65535,
			DirectoryOffset: uint64(i.place(64 << 20))}
		i.h.AutoclearFeatures = layout.AutoclearBitmaps
		return i
	}, ""},
	{"a header full of extensions", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<20)
		for range i.cs/8 - 100 {
			i.x.Unknown = append(i.x.Unknown, layout.RawExtension{Magic: 0x12345678})
		}
		return i
	}, ""},
	{"one extension of the whole header", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<20)
		i.x.Unknown = []layout.RawExtension{{Magic: 0x12345678, Data: make([]byte, i.cs-1000)}}
		return i
	}, ""},
	{"a feature name table of the whole header", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<20)
		names := make([]byte, i.cs-1000)
		for k := range names {
			names[k] = 'x'
		}
		for k := 0; k+48 <= len(names); k += 48 {
			names[k], names[k+1] = 0, byte(k/48)&63
		}
		i.x.Unknown = []layout.RawExtension{{Magic: 0x6803f857, Data: names}}
		i.h.IncompatibleFeatures = 1 << 20
		return i
	}, "Unsupported qcow2 feature(s): xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"},
	{"marks of more bitmaps than there are", func(t testing.TB) *image {
		i := newImage(t, 3, 21, 1<<20)
		e := layout.NewBitmap("", 65536, layout.BitmapInUse)
		e.TableSize = 1
		e.TableOffset = uint64(i.place(8))
		i.bitmaps(65535, 5, e, nil)
		i.h.AutoclearFeatures |= layout.AutoclearMarks
		for k := range uint64(250000) {
			i.x.Marks = append(i.x.Marks, k)
		}
		return i
	}, ""},
}

// memory is what the daemon has used at most, and has mapped now, in bytes.
func memory(t testing.TB, d *daemon.Daemon) (peak, mapped int64) {
	t.Helper()
	peak, err := d.Memory("VmHWM")
	if err == nil {
		mapped, err = d.Memory("VmSize")
	}
	if err != nil {
		t.Fatalf("the daemon is gone: %v", err)
	}
	return peak, mapped
}

// limited starts a daemon that may map room more than it has.
func limited(t testing.TB) (d *daemon.Daemon, before int64) {
	t.Helper()
	dir, err := os.MkdirTemp("", "budget") // the names of its sockets are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d = daemon.Start(t, dir)
	before, mapped := memory(t, d)
	limit := syscall.Rlimit{Cur: uint64(mapped + room), Max: uint64(mapped + room)}
	if _, _, e := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, uintptr(d.Cmd.Process.Pid), syscall.RLIMIT_AS,
		uintptr(unsafe.Pointer(&limit)), 0, 0, 0); e != 0 {
		t.Fatal(e)
	}
	return d, before
}

// add opens an image and returns the error's text.
func add(q *daemon.QMP, name, path string, readOnly bool, more map[string]any) string {
	o := map[string]any{"driver": "qcow2", "node-name": name, "read-only": readOnly, "file": map[string]any{"driver": "file", "filename": path, "read-only": readOnly}}
	for k, v := range more {
		o[k] = v
	}
	if _, err := q.Do("blockdev-add", o); err != nil {
		if e, ok := err.(*daemon.Error); ok {
			return e.Desc
		}
		return err.Error()
	}
	return ""
}

// TestShapes opens each of them, for reading with all checks and for writing, and does with it what
// clients do.
func TestShapes(t *testing.T) {
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			i := s.image(t)
			there := i.write()
			d, before := limited(t)
			begun := time.Now()
			q := d.Dial(t)
			q.SetDeadline(time.Now().Add(time.Minute))
			do := func(command string, args map[string]any) error {
				_, err := q.Do(command, args)
				return err
			}
			if err := do("blockdev-add", map[string]any{"driver": "null-co", "node-name": "other", "size": 1 << 20}); err != nil {
				t.Fatal(err)
			}
			for _, readOnly := range []bool{true, false} {
				text := add(q, "n", i.path, readOnly, map[string]any{"overlap-check": "all", "l2-cache-size": 1 << 40, "l2-cache-entry-size": 4096})
				if text != s.want && i.cs >= 4096 {
					t.Fatalf("%q, want %q", text, s.want)
				}
				if text != "" && i.cs < 4096 {
					text = add(q, "n", i.path, readOnly, map[string]any{"overlap-check": "all"})
				}
				if text != s.want {
					t.Fatalf("%q, want %q", text, s.want)
				}
				if text != "" {
					continue
				}
				use(t, d, q, readOnly)
				if err := do("blockdev-del", map[string]any{"node-name": "n"}); err != nil {
					t.Error(err)
				}
			}
			peak, _ := memory(t, d)
			limit := before + constant + perByte*there + perItem*i.items
			if testing.Verbose() {
				t.Logf("%v, %d KiB, of %d KiB for a file of %d KiB", time.Since(begun), (peak-before)>>10, (limit-before)>>10, there>>10)
			}
			if peak > limit {
				t.Errorf("%d KiB for a file of %d KiB, limit %d", (peak-before)>>10, there>>10, (limit-before)>>10)
			}
			d.Stop(t)
		})
	}
}

// use looks at the node, exports it and sends it requests. Those may fail.
func use(t *testing.T, d *daemon.Daemon, q *daemon.QMP, readOnly bool) {
	t.Helper()
	for range 2 {
		if _, err := q.Do("query-named-block-nodes", nil); err != nil {
			t.Error(err)
		}
	}
	_, _ = q.Do("block-dirty-bitmap-add", map[string]any{"node": "n", "name": "mine", "granularity": 512})
	if _, err := q.Do("block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "writable": !readOnly}); err != nil {
		t.Fatal(err)
	}
	n, err := d.DialNBD("n")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	n.SetDeadline(time.Now().Add(time.Minute))
	b := make([]byte, 4096)
	for _, off := range []int64{0, n.Size / 2 &^ 4095, n.Size - 4096} {
		_ = n.ReadAt(b, off)
		if !readOnly {
			_ = n.WriteAt(b, off)
			_ = n.Trim(off, 4096)
		}
	}
	_ = n.Flush()
	if _, err := q.Do("block-export-del", map[string]any{"id": "e", "mode": "hard"}); err != nil {
		t.Error(err)
	}
	q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "e"})
}

// TestCompressedUnderWay: many readers of compressed clusters of 2 MiB, of which each would have
// the decoder hold 8 MiB.
func TestCompressedUnderWay(t *testing.T) {
	const clusters = 32
	i := newImage(t, 3, 21, clusters<<21)
	i.h.IncompatibleFeatures, i.h.CompressionType = layout.IncompatCompression, layout.CompressionZstd
	// A frame with a window of 8 MiB and one block that says: 128 KiB of zeroes; again and again.
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 13 << 3}
	for k := range 16 {
		last := uint32(0)
		if k == 15 {
			last = 1
		}
		h := uint32(128<<10)<<3 | 1<<1 | last
		frame = append(frame, byte(h), byte(h>>8), byte(h>>16), 0)
	}
	at := i.place(clusters * 512)
	g := i.h.Geometry()
	l2 := i.table(i.cs/8, func(k int64) uint64 {
		if k >= clusters {
			return 0
		}
		i.put(at+k*512, frame)
		return g.CompressedEntry(at+k*512, 512)
	})
	i.u64(int64(i.h.L1TableOffset), uint64(l2))
	there := i.write()
	d, before := limited(t)
	q := d.Dial(t)
	if text := add(q, "n", i.path, true, nil); text != "" {
		t.Fatal(text)
	}
	if _, err := q.Do("block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n"}); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for k := range 40 {
		all.Go(func() {
			n, err := d.DialNBD("n")
			if err != nil {
				t.Error(err)
				return
			}
			defer n.Close()
			b := make([]byte, 512)
			for j := range clusters {
				off := int64((k+j)%clusters)<<21 + 512
				if err := n.ReadAt(b, off); err != nil {
					t.Errorf("at %d: %v", off, err)
					return
				}
			}
		})
	}
	all.Wait()
	const underWay = 160 << 20 // docs/limits.md
	peak, _ := memory(t, d)
	if limit := before + constant + perByte*there + underWay; peak > limit {
		t.Errorf("%d KiB, limit %d", (peak-before)>>10, (limit-before)>>10)
	}
	if testing.Verbose() {
		t.Logf("%d KiB", (peak-before)>>10)
	}
	d.Stop(t)
}
