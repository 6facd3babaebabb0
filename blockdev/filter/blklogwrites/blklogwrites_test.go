package blklogwrites

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

func TestSuite(t *testing.T) {
	for name, o := range map[string]*types.BlockdevOptionsBlklogwrites{
		"512":  {},
		"4096": {LogSectorSize: new(uint32(4096)), LogSuperUpdateInterval: new(uint64(1))},
	} {
		t.Run(name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
				Size:   1 << 20,
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					n, err := logged(t, g, drivertest.NewMemFile(size), drivertest.NewMemFile(0), o, ro)
					if err != nil {
						t.Fatal(err)
					}
					return n
				},
			})
		})
	}
}

// logged puts the filter on file, with a log.
func logged(
	t *testing.T, g *graph.Graph, file, log *drivertest.MemFile, o *types.BlockdevOptionsBlklogwrites, ro bool,
) (*graph.Node, error) {
	mem := func(name string, f *drivertest.MemFile) *graph.Node {
		return drivertest.MustBuild(t, g, drivertest.Spec{
			Options: graph.Options{Name: name, Kind: graph.Protocol, ReadOnly: ro}, Open: drivertest.Opened(f)})
	}
	return drivertest.Build(g, drivertest.Spec{
		Options: graph.Options{Name: "l", DriverName: "blklogwrites", Kind: graph.Filter, ReadOnly: ro},
		Children: []drivertest.Child{
			drivertest.FilteredFile(mem("file", file)), {Name: "log", Role: perm.Metadata, Node: mem("log", log)},
		},
		Open: Def.With(o),
	})
}

// replay does on disk what the log says and returns the number of entries and of flushes.
func replay(t *testing.T, log, disk []byte) (entries, flushes int) {
	t.Helper()
	if le.Uint64(log) != magic || le.Uint64(log[8:]) != version {
		t.Fatalf("super block % x", log[:superSize])
	}
	n, sector := le.Uint64(log[16:]), int64(le.Uint32(log[24:]))
	for at := sector; n > 0; n-- {
		e := log[at:]
		off, size, flags := int64(le.Uint64(e))*sector, int64(le.Uint64(e[8:]))*sector, le.Uint64(e[16:])
		at += sector
		entries++
		switch flags {
		case 0:
			copy(disk[off:off+size], log[at:])
			at += size
		case flagFlush:
			flushes++
		case flagDiscard:
			clear(disk[off : off+size])
		default:
			t.Fatalf("flags %x", flags)
		}
	}
	return entries, flushes
}

// TestReplay: a disk is what the log says, at every flush, also if the log goes on after an end of
// the node.
func TestReplay(t *testing.T) {
	const size = 256 << 10
	for _, sector := range []uint32{512, 4096} {
		t.Run(fmt.Sprint(sector), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(1, uint64(sector)))
			file, log := drivertest.NewMemFile(size), drivertest.NewMemFile(0)
			o := &types.BlockdevOptionsBlklogwrites{LogSectorSize: &sector}
			before := 0
			for i := range 4 {
				t.Run(fmt.Sprint(i), func(t *testing.T) { before = round(t, rnd, file, log, o, before) })
				o = &types.BlockdevOptionsBlklogwrites{LogAppend: new(true), LogSuperUpdateInterval: new(uint64(7))}
			}
		})
	}
}

// round does a hundred requests, and returns the number of entries that are in the log then.
func round(
	t *testing.T, rnd *rand.Rand, file, log *drivertest.MemFile, o *types.BlockdevOptionsBlklogwrites, before int,
) int {
	g := drivertest.NewGraph(t)
	n, err := logged(t, g, file, log, o, false)
	if err != nil {
		t.Fatal(err)
	}
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	size := file.Size()
	for range 100 {
		off := rnd.Int64N(size/512) * 512
		ln := min(1+rnd.Int64N(40), (size-off)/512) * 512
		switch rnd.IntN(4) {
		case 0:
			err = root.Discard(r, off, ln)
		case 1:
			err = root.Zero(r, off, ln, 0)
		default:
			b := make([]byte, ln)
			for i := range b {
				b[i] = byte(1 + rnd.IntN(255))
			}
			err = root.WriteAt(r, blk.Bufs([][]byte{b[:512], b[512:]}), off, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		if rnd.IntN(10) > 0 {
			continue
		}
		for range 2 { // the second has nothing to do
			if err := root.Flush(r); err != nil {
				t.Fatal(err)
			}
		}
		disk := make([]byte, size)
		entries, flushes := replay(t, log.Bytes(), disk)
		if !bytes.Equal(disk, file.Bytes()) {
			t.Fatalf("after %d entries the log tells of another disk", entries)
		}
		if entries <= before || flushes == 0 {
			t.Fatalf("%d entries, %d flushes; %d before", entries, flushes, before)
		}
	}
	if err := root.Flush(r); err != nil {
		t.Fatal(err)
	}
	entries, _ := replay(t, log.Bytes(), make([]byte, size))
	return entries
}

// TestBadLogs: a log that cannot be gone on with is refused.
func TestBadLogs(t *testing.T) {
	log := func(m, v, n uint64, sector uint32, flags uint64) []byte {
		b := make([]byte, 4096)
		le.PutUint64(b, m)
		le.PutUint64(b[8:], v)
		le.PutUint64(b[16:], n)
		le.PutUint32(b[24:], sector)
		le.PutUint64(b[512+8:], 1)
		le.PutUint64(b[512+16:], flags)
		return b
	}
	for want, b := range map[string][]byte{
		"Invalid log superblock magic":        log(1, 1, 0, 512, 0),
		"Unsupported log version 2":           log(magic, 2, 0, 512, 0),
		"Invalid log sector size 100":         log(magic, 1, 0, 100, 0),
		"Invalid log sector size 0":           log(magic, 1, 0, 0, 0),
		"Invalid flags 0x80 in log entry 0":   log(magic, 1, 1, 512, 0x80),
		"Failed to read log entry 7: ":        log(magic, 1, 1<<63, 512, 0),
		"log-append and log-sector-size are ": nil,
	} {
		o := &types.BlockdevOptionsBlklogwrites{LogAppend: new(true)}
		if b == nil {
			o.LogSectorSize = new(uint32(512))
		}
		_, err := logged(t, drivertest.NewGraph(t), drivertest.NewMemFile(4096), drivertest.MemFileOf(b), o, false)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}
