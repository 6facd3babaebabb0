package budget

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"qblockd/blockdev/format/qcow2/layout"
)

var be = binary.BigEndian

// image is a file that is made to look like an image of great things.
type image struct {
	t     testing.TB
	f     *os.File
	path  string
	h     layout.Header
	x     layout.Extensions
	cs    int64
	end   int64 // where the next table goes; all before is counted
	items int64 // snapshots and bitmaps
}

// newImage is an image with nothing in it but a header, a refcount table and one refcount block.
// Its L1 table has as many entries as size needs, which are a hole.
func newImage(t testing.TB, version uint32, clusterBits uint32, size uint64) *image {
	i := &image{t: t, path: filepath.Join(t.TempDir(), "i.qcow2"), cs: 1 << clusterBits}
	var err error
	if i.f, err = os.Create(i.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.f.Close() })
	i.h = layout.Header{Version: version, ClusterBits: clusterBits, Size: size, RefcountOrder: 4, RefcountTableClusters: 1}
	i.end = i.cs
	i.h.RefcountTableOffset = uint64(i.place(i.cs))
	i.u64(int64(i.h.RefcountTableOffset), uint64(i.place(i.cs)))
	i.l1(uint32(i.h.Geometry().L1Entries(size)))
	return i
}

// place finds n bytes of clusters, which are a hole.
func (i *image) place(n int64) int64 {
	off := i.end
	i.end += (max(n, 1) + i.cs - 1) &^ (i.cs - 1)
	return off
}

func (i *image) put(off int64, b []byte) {
	if _, err := i.f.WriteAt(b, off); err != nil {
		i.t.Fatal(err)
	}
}

func (i *image) u64(off int64, v uint64) { i.put(off, be.AppendUint64(nil, v)) }

// table is a table of n entries of 8 bytes.
func (i *image) table(n int64, entry func(k int64) uint64) int64 {
	b := make([]byte, 0, n*8)
	for k := range n {
		b = be.AppendUint64(b, entry(k))
	}
	off := i.place(n * 8)
	i.put(off, b)
	return off
}

// l1 is an L1 table of n entries that are a hole.
func (i *image) l1(n uint32) {
	i.h.L1Size, i.h.L1TableOffset = n, uint64(i.place(int64(n)*8))
}

// bitmaps enters bitmaps, all like e but for their names and what each does.
func (i *image) bitmaps(n, nameLen int, e layout.BitmapEntry, each func(k int, e *layout.BitmapEntry)) {
	i.items += int64(n)
	l := make([]layout.BitmapEntry, n)
	for k := range l {
		l[k] = e
		l[k].Name = fmt.Sprintf("%0*d", nameLen, k)
		if each != nil {
			each(k, &l[k])
		}
	}
	b := layout.AppendBitmapDirectory(nil, l)
	off := i.place(int64(len(b)))
	i.put(off, b)
	i.x.Bitmaps = &layout.Bitmaps{NbBitmaps: uint32(n), DirectorySize: uint64(len(b)), DirectoryOffset: uint64(off)}
	i.h.AutoclearFeatures |= layout.AutoclearBitmaps
}

// snapshots enters n snapshots with an L1 table at l1, which may be longer than one is.
func (i *image) snapshots(n, nameLen, extraLen int, l1 int64, entries uint32) {
	i.items += int64(n)
	var b []byte
	for k := range n {
		e := make([]byte, layout.SnapshotHeaderSize, 2048)
		id := fmt.Sprint(k + 1)
		be.PutUint64(e, uint64(l1))
		be.PutUint32(e[8:], entries)
		be.PutUint16(e[12:], uint16(len(id)))
		be.PutUint16(e[14:], uint16(nameLen))
		be.PutUint32(e[36:], uint32(extraLen))
		e = append(e, make([]byte, extraLen)...)
		e = append(e, id...)
		for range nameLen {
			e = append(e, 0xff) // no character
		}
		b = append(b, e...)
		b = append(b, make([]byte, -len(b)&7)...)
	}
	off := i.place(int64(len(b)))
	i.put(off, b)
	i.h.NbSnapshots, i.h.SnapshotsOffset = uint32(n), uint64(off)
}

// write finishes the file and returns how many bytes of it are there.
func (i *image) write() int64 {
	b, err := i.h.Marshal(&i.x, "")
	if err != nil {
		i.t.Fatal(err)
	}
	i.put(0, b)
	ref := make([]byte, 2*min(i.end/i.cs, i.cs/2))
	for k := 0; k < len(ref); k += 2 {
		ref[k+1] = 1
	}
	i.put(2*i.cs, ref)
	if err := i.f.Truncate(max(i.end, 1<<20)); err != nil {
		i.t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(i.f.Fd()), &st); err != nil {
		i.t.Fatal(err)
	}
	return st.Blocks * 512
}
