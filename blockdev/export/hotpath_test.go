package export_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/export"
	"qblockd/blockdev/export/nbd"
	"qblockd/blockdev/nbdwire"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// The whole way of a request: a client's socket, the NBD server, the export's root, the nodes,
// their files.

const hotSize = 64 << 20

// stack is a graph with an NBD server.
type stack struct {
	t     testing.TB
	m     *blockdev.Manager
	table *export.Table
	dir   string
	sock  string
}

func newStack(t testing.TB) *stack {
	t.Helper()
	dir := t.TempDir()
	// What is measured is ours, not a disk.
	if d, err := os.MkdirTemp("/dev/shm", "qblockd-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(d) })
		dir = d
	}
	g := drivertest.NewGraph(t)
	s := &stack{t: t, dir: dir, sock: filepath.Join(dir, "nbd"), table: export.New(g, export.Options{}),
		m: blockdev.New(g, blockdev.Config{Drivers: drivers.All, Log: slog.New(slog.DiscardHandler)})}
	server := nbd.NewType(s.table, nbd.Options{})
	t.Cleanup(func() { s.table.Close(context.Background()) })
	s.must(server.Start(context.Background(), unixServer(s.sock)))
	return s
}

func (s *stack) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// add makes a node of options with single quotes and exports it by its name.
func (s *stack) add(name, text string) {
	s.t.Helper()
	v, err := value.Parse(text)
	s.must(err)
	o, err := types.DecodeBlockdevOptions(v, types.ModeQObject)
	s.must(err)
	s.must(s.m.Add(context.Background(), o))
	yes := true
	s.must(s.table.Add(context.Background(), &types.BlockExportOptions{Type: types.BlockExportTypeNbd, ID: name,
		NodeName: name, Writable: &yes, U: &types.BlockExportOptionsNbd{}}))
}

// raw makes a file of hotSize without holes.
func (s *stack) raw(name string) string {
	path := filepath.Join(s.dir, name)
	data := make([]byte, hotSize)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	s.must(os.WriteFile(path, data, 0o600))
	return path
}

// qcow2 makes an empty image.
func (s *stack) qcow2(name string, size uint64) string {
	path := filepath.Join(s.dir, name)
	s.must(os.WriteFile(path, nil, 0o600))
	o := &types.BlockdevCreateOptionsQcow2{Size: size}
	v, err := value.Parse("{'driver': 'file', 'filename': '" + path + "'}")
	s.must(err)
	o.File.Definition, err = types.DecodeBlockdevOptions(v, types.ModeQObject)
	s.must(err)
	s.must(s.m.Creator(&types.BlockdevCreateOptions{Driver: "qcow2", U: o})(context.Background(), func() {}))
	return path
}

// standard adds the nodes null, file, raw, qcow2 (all of it allocated) and layer (empty, on top of
// a file).
func (s *stack) standard() {
	s.add("null", fmt.Sprintf("{'driver': 'null-co', 'node-name': 'null', 'size': %d}", hotSize))
	s.add("file", "{'driver': 'file', 'node-name': 'file', 'filename': '"+s.raw("file")+"'}")
	s.add("raw", "{'driver': 'raw', 'node-name': 'raw', 'file': {'driver': 'file', 'filename': '"+s.raw("raw")+"'}}")
	s.add("qcow2", "{'driver': 'qcow2', 'node-name': 'qcow2', 'file': {'driver': 'file', 'filename': '"+s.qcow2("qcow2", hotSize)+"'}}")
	s.add("layer", "{'driver': 'qcow2', 'node-name': 'layer', 'file': {'driver': 'file', 'filename': '"+s.qcow2("layer", hotSize)+"'},"+
		"'backing': {'driver': 'file', 'filename': '"+s.raw("base")+"', 'read-only': true}}")
	c := s.client("qcow2")
	for off := int64(0); off < hotSize; off += 1 << 20 {
		c.once(nbdwire.CmdWrite, 1<<20, 1, func() int64 { return off })
	}
}

// client is a connection that asks for many things at once. It allocates nothing while it runs.
type client struct {
	t    testing.TB
	nc   net.Conn
	out  []byte
	in   []byte
	data []byte
}

func (s *stack) client(name string) *client {
	s.t.Helper()
	nc, err := net.Dial("unix", s.sock)
	s.must(err)
	s.t.Cleanup(func() { nc.Close() })
	b := append([]byte{0, 0, 0, 3}, nbdwire.AppendOption(nil, nbdwire.OptStructuredReply, nil)...)
	b = append(b, nbdwire.AppendOption(nil, nbdwire.OptExportName, []byte(name))...)
	_, err = nc.Write(b)
	s.must(err)
	_, err = io.ReadFull(nc, make([]byte, nbdwire.GreetingSize+20+nbdwire.ExportNameReply))
	s.must(err)
	return &client{t: s.t, nc: nc, out: make([]byte, 0, 64*(4096+nbdwire.RequestSize)+2<<20), in: make([]byte, 2<<20),
		data: make([]byte, 1<<20)}
}

// once sends count requests for n bytes at offsets that next gives, and takes all replies.
func (c *client) once(cmd uint16, n, count int, next func() int64) {
	for i := range count {
		q := nbdwire.Request{Cmd: cmd, Cookie: uint64(i), Off: uint64(next()), Len: uint64(n)}
		c.out = q.Append(c.out)
		if cmd == nbdwire.CmdWrite {
			c.out = append(c.out, c.data[:n]...)
		}
		if len(c.out) > 1<<20 {
			c.send()
		}
	}
	c.send()
	r, w := 0, 0
	take := func(k int) []byte {
		for w-r < k {
			if r > 0 {
				w = copy(c.in, c.in[r:w])
				r = 0
			}
			got, err := c.nc.Read(c.in[w:])
			if err != nil {
				c.t.Error(err)
				return nil
			}
			w += got
		}
		r += k
		return c.in[r-k : r]
	}
	for count > 0 {
		h := take(nbdwire.SimpleSize)
		if h == nil {
			return
		}
		if binary.BigEndian.Uint32(h) == 0x67446698 {
			if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
				c.t.Errorf("error %d", e)
			}
			count--
			continue
		}
		flags, typ := binary.BigEndian.Uint16(h[4:]), binary.BigEndian.Uint16(h[6:])
		if typ>>15 != 0 {
			c.t.Errorf("error chunk %#x", typ)
		}
		size := take(4)
		if size == nil || take(int(binary.BigEndian.Uint32(size))) == nil {
			return
		}
		if flags&nbdwire.ChunkDone != 0 {
			count--
		}
	}
}

func (c *client) send() {
	if _, err := c.nc.Write(c.out); err != nil {
		c.t.Error(err)
	}
	c.out = c.out[:0]
}

// offsets gives random multiples of n; they are the same each time.
func offsets(n int) func() int64 {
	rnd := rand.New(rand.NewPCG(7, 7))
	return func() int64 { return int64(rnd.IntN(hotSize/n)) * int64(n) }
}

type hotLoad struct {
	name   string
	cmd    uint16
	n, qd  int
	normal bool // not for null
}

var hotLoads = []hotLoad{
	{"read-4k-qd1", nbdwire.CmdRead, 4096, 1, false},
	{"read-4k-qd16", nbdwire.CmdRead, 4096, 16, false},
	{"read-64k-qd4", nbdwire.CmdRead, 64 << 10, 4, true},
	{"read-1M-qd1", nbdwire.CmdRead, 1 << 20, 1, true},
	{"write-4k-qd1", nbdwire.CmdWrite, 4096, 1, false},
	{"write-4k-qd16", nbdwire.CmdWrite, 4096, 16, false},
	{"write-1M-qd2", nbdwire.CmdWrite, 1 << 20, 2, false},
}

// TestHotPathAllocations: no request of the usual kinds allocates, from the client's socket to the
// file and back.
func TestHotPathAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools allocate")
	}
	s := newStack(t)
	s.standard()
	for _, node := range []string{"null", "file", "raw", "qcow2", "layer"} {
		for _, l := range hotLoads {
			if l.normal && node == "null" || l.cmd == nbdwire.CmdWrite && node == "layer" {
				continue
			}
			t.Run(node+"/"+l.name, func(t *testing.T) {
				c := s.client(node)
				c.t = t
				next := offsets(l.n)
				once := func() { c.once(l.cmd, l.n, l.qd, next) }
				for range 50 {
					once()
				}
				// The runtime's own work, and pools that a collection emptied, are not of requests.
				least := 1e9
				for begin := time.Now(); least > 0 && time.Since(begin) < 3*time.Second; {
					least = min(least, testing.AllocsPerRun(50, once)/float64(l.qd))
				}
				if least > 0 {
					t.Errorf("%v allocations a request", least)
				}
			})
		}
	}
}

// TestStats: requests are counted once each, on whatever way they are served.
func TestStats(t *testing.T) {
	s := newStack(t)
	s.add("file", "{'driver': 'file', 'node-name': 'file', 'filename': '"+s.raw("file")+"'}")
	c := s.client("file")
	zero := func() int64 { return 0 }
	c.once(nbdwire.CmdRead, 4096, 3, zero)
	c.once(nbdwire.CmdRead, 1<<20, 2, zero) // mapped
	c.once(nbdwire.CmdWrite, 4096, 5, zero)
	c.once(nbdwire.CmdWrite, 1<<20, 1, zero) // by a worker, where there are processors enough
	c.once(nbdwire.CmdFlush, 0, 1, zero)
	c.once(nbdwire.CmdTrim, 8192, 2, zero)
	x := s.table.Stats("file")
	for what, got := range map[string][2]int64{
		"reads": {x.RdOperations, 5}, "bytes read": {x.RdBytes, 3*4096 + 2<<20},
		"writes": {x.WrOperations, 6}, "bytes written": {x.WrBytes, 5*4096 + 1<<20},
		"flushes": {x.FlushOperations, 1}, "discards": {x.UnmapOperations, 2}, "bytes discarded": {x.UnmapBytes, 2 * 8192},
		"failures": {x.FailedRdOperations + x.FailedWrOperations + x.InvalidRdOperations + x.InvalidWrOperations, 0},
		"highest":  {x.WrHighestOffset, 1 << 20},
	} {
		if got[0] != got[1] {
			t.Errorf("%d %s, want %d", got[0], what, got[1])
		}
	}
	if x.RdTotalTimeNs <= 0 || x.WrTotalTimeNs <= 0 || x.IdleTimeNs == nil {
		t.Errorf("times: %+v", x)
	}
	if s.table.Stats("none") != nil {
		t.Error("there is no such export")
	}
}

// BenchmarkHotPath is for profiles: go test ./blockdev/export -bench HotPath/qcow2/read-4k-qd16
// -cpuprofile cpu.prof
func BenchmarkHotPath(b *testing.B) {
	s := newStack(b)
	s.standard()
	for _, node := range []string{"null", "file", "raw", "qcow2", "layer"} {
		for _, l := range hotLoads {
			if l.cmd == nbdwire.CmdWrite && node == "layer" {
				continue
			}
			b.Run(node+"/"+l.name, func(b *testing.B) {
				c := s.client(node)
				next := offsets(l.n)
				b.SetBytes(int64(l.n))
				b.ReportAllocs()
				for n := 0; b.Loop(); n++ {
					if n%l.qd == 0 {
						c.once(l.cmd, l.n, l.qd, next)
					}
				}
			})
		}
	}
	s.growing(b)
}

// growing writes to clusters that are not there: into an empty image, and below what it copies from
// a file.
func (s *stack) growing(b *testing.B) {
	for _, x := range []struct {
		name    string
		n, qd   int
		step    int64
		backing string
	}{
		{"write-1M-qd2", 1 << 20, 2, 1 << 20, ""},
		{"write-4k-qd16", 4096, 16, 64 << 10, ""},
		{"copying-4k-qd16", 4096, 16, 64 << 10, "base"},
	} {
		b.Run("new/"+x.name, func(b *testing.B) {
			b.SetBytes(int64(x.n))
			b.ReportAllocs()
			var c *client
			off := int64(hotSize)
			for n := 0; b.Loop(); n++ {
				if n%x.qd != 0 {
					continue
				}
				if off+x.step*int64(x.qd) > hotSize {
					b.StopTimer()
					if c != nil {
						c.nc.Close()
						s.must(s.table.Del(context.Background(), "new", types.BlockExportRemoveModeHard))
						for len(s.table.Query()) > 5 {
							time.Sleep(time.Millisecond)
						}
						s.must(s.m.Del(context.Background(), "new"))
					}
					more := ""
					if x.backing != "" {
						more = ", 'backing': {'driver': 'file', 'filename': '" + filepath.Join(s.dir, x.backing) + "2', 'read-only': true}"
						s.raw(x.backing + "2")
					}
					s.add("new", "{'driver': 'qcow2', 'node-name': 'new', 'file': {'driver': 'file', 'filename': '"+s.qcow2("new", hotSize)+"'}"+more+"}")
					c, off = s.client("new"), 0
					b.StartTimer()
				}
				c.once(nbdwire.CmdWrite, x.n, x.qd, func() int64 { off += x.step; return off - x.step })
			}
			c.nc.Close()
			s.must(s.table.Del(context.Background(), "new", types.BlockExportRemoveModeHard))
			for len(s.table.Query()) > 5 {
				time.Sleep(time.Millisecond)
			}
			s.must(s.m.Del(context.Background(), "new"))
		})
	}
}
