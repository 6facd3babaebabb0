package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) + byte(i>>12)*3 + seed
	}
	return b
}

// Each way a request can take (inline, worker, mapped, unmapped; simple, structured) gives the same
// data.
func TestReadWriteAllWays(t *testing.T) {
	for _, form := range []nbdwire.Form{nbdwire.Simple, nbdwire.Structured, nbdwire.Extended} {
		for _, mapped := range []bool{false, true} {
			for _, workers := range []bool{false, true} {
				t.Run(fmt.Sprintf("form=%d,mapped=%v,workers=%v", form, mapped, workers), func(t *testing.T) {
					d := newFileDevice(t, 8<<20)
					d.noMap = !mapped
					d.wouldBlock.Store(workers)
					_, _, path := server(t, d, Options{})
					testAgainstModel(t, open(t, path, form), int(d.size))
				})
			}
		}
	}
}

// testAgainstModel does random requests one by one and compares with a slice.
func testAgainstModel(t *testing.T, c *client, size int) {
	model := make([]byte, size)
	rnd := rand.New(rand.NewPCG(1, 2))
	lens := []int{1, 511, 4096, 65535, 65536, 65537, 300000, 1 << 20, 3<<20 + 5}
	steps := 120
	if raceEnabled {
		steps = 25
	}
	for i := range steps {
		n := lens[rnd.IntN(len(lens))]
		off := rnd.IntN(size - n + 1)
		switch rnd.IntN(5) {
		case 0, 1:
			b := pattern(n, byte(i))
			if a := c.do(wr(uint64(off), uint32(n)), b...); a.errno != 0 {
				t.Fatalf("write %d+%d: %d %s", off, n, a.errno, a.msg)
			}
			copy(model[off:], b)
		case 2:
			q := req(nbdwire.CmdWriteZeroes, uint64(off), uint32(n), nil)
			if a := c.do(q); a.errno != 0 {
				t.Fatalf("zero %d+%d: %d %s", off, n, a.errno, a.msg)
			}
			clear(model[off : off+n])
		default:
			var f []uint16
			if c.flag&nbdwire.FlagDF != 0 && rnd.IntN(2) == 0 {
				f = append(f, nbdwire.CmdFlagDF)
			}
			a := c.do(rd(uint64(off), uint32(n), f...))
			if a.errno != 0 || !bytes.Equal(a.data, model[off:off+n]) {
				t.Fatalf("request %d: read %d+%d: errno %d, %d bytes of holes, data differ", i, off, n, a.errno, a.holes)
			}
			if len(f) > 0 && a.holes > 0 {
				t.Fatalf("holes in a read that must not be divided")
			}
		}
	}
}

// Files opened with O_DIRECT are read by workers, several at a time, and not by sendfile.
func TestDirectFilesAreRead(t *testing.T) {
	for _, direct := range []bool{false, true} {
		d := newFileDevice(t, 4<<20)
		d.direct = direct
		var reads atomic.Int64
		d.fault = func(op string) error {
			if op == "read" {
				reads.Add(1)
			}
			return nil
		}
		_, _, path := server(t, d, Options{})
		c := open(t, path, nbdwire.Structured)
		c.do(wr(0, 2<<20), pattern(2<<20, 1)...)
		for _, n := range []uint32{mapMin, streamMin, 1 << 20} {
			if a := c.do(rd(4096, n)); a.errno != 0 || !bytes.Equal(a.data, pattern(2<<20, 1)[4096:][:n]) {
				t.Errorf("direct=%v: errno %d, or other data", direct, a.errno)
			}
		}
		want := int64(0)
		if direct {
			want = 3
		}
		if n := reads.Load(); n != want {
			t.Errorf("direct=%v: %d reads of the device, want %d", direct, n, want)
		}
	}
}

func TestHolesInStructuredReads(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		d := newFileDevice(t, 4<<20)
		d.noMap = !mapped
		_, _, path := server(t, d, Options{})
		c := open(t, path, nbdwire.Structured)
		c.do(wr(1<<20, 1<<20), pattern(1<<20, 1)...)
		a := c.do(rd(0, 4<<20))
		if a.errno != 0 || a.holes != 3<<20 || !bytes.Equal(a.data[1<<20:2<<20], pattern(1<<20, 1)) {
			t.Errorf("mapped=%v: errno %d, %d bytes of holes", mapped, a.errno, a.holes)
		}
	}
}

// A queue of requests in one write is answered in full, whatever the mix.
func TestPipelined(t *testing.T) {
	d := newFileDevice(t, 4<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	c.do(wr(0, 4<<20), pattern(4<<20, 0)...)
	want := pattern(4<<20, 0)
	var qs []nbdwire.Request
	var out []byte
	for i := range 300 {
		n := []uint32{512, 4096, 70000, 1 << 18}[i%4]
		q := rd(uint64(i)*4096, n)
		q.Cookie = uint64(i)
		qs = append(qs, q)
		out = q.Append(out)
	}
	go c.nc.Write(out)
	for _, q := range qs {
		if a := c.reply(q); a.errno != 0 || !bytes.Equal(a.data, want[q.Off:q.Off+uint64(q.Len)]) {
			t.Fatalf("request %d: errno %d, or data differ", q.Cookie, a.errno)
		}
	}
}

func TestFlags(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	flags := func() blk.Flags { return blk.Flags(d.lastFlags.Load()) }
	c.do(wr(0, 4), 1, 2, 3, 4)
	if flags() != 0 {
		t.Errorf("write: %b", flags())
	}
	c.do(wr(0, 4, nbdwire.CmdFlagFUA), 1, 2, 3, 4)
	if flags() != blk.FUA {
		t.Errorf("write with FUA: %b", flags())
	}
	zero := func(f ...uint16) answer { return c.do(req(nbdwire.CmdWriteZeroes, 0, 4096, f)) }
	if zero(); flags() != blk.MayUnmap {
		t.Errorf("zero: %b", flags())
	}
	if zero(nbdwire.CmdFlagNoHole); flags() != 0 {
		t.Errorf("zero without holes: %b", flags())
	}
	a := zero(nbdwire.CmdFlagFastZero, nbdwire.CmdFlagFUA)
	if a.errno != nbdwire.ENOTSUP || flags() != blk.MayUnmap|blk.NoFallback|blk.FUA {
		t.Errorf("fast zero: %d, %b", a.errno, flags())
	}
	before := d.flushes.Load()
	c.do(req(nbdwire.CmdTrim, 0, 4096, []uint16{nbdwire.CmdFlagFUA}))
	c.do(rd(0, 512, nbdwire.CmdFlagFUA))
	c.do(req(nbdwire.CmdFlush, 0, 0, nil))
	if n := d.flushes.Load() - before; n != 3 {
		t.Errorf("%d flushes instead of 3", n)
	}
	if a := c.do(req(nbdwire.CmdCache, 0, 4096, nil)); a.errno != 0 {
		t.Errorf("cache: %d %s", a.errno, a.msg)
	}

	_, _, path = server(t, d, Options{}, func(s *Spec) { s.Writethrough = true })
	c = open(t, path, nbdwire.Structured)
	c.do(wr(0, 4), 1, 2, 3, 4)
	if flags() != blk.FUA {
		t.Errorf("write through: %b", flags())
	}
}

func TestDeviceErrors(t *testing.T) {
	for _, form := range []nbdwire.Form{nbdwire.Simple, nbdwire.Structured, nbdwire.Extended} {
		structured := form != nbdwire.Simple
		for _, workers := range []bool{false, true} {
			d := newFileDevice(t, 1<<20)
			d.noMap = true
			d.wouldBlock.Store(workers)
			d.fault = func(op string) error {
				return map[string]error{"read": syscall.EIO, "write": syscall.ENOSPC, "zero": blk.ErrReadOnly,
					"flush": errors.New("odd"), "discard": blk.ErrNotSupported, "status": syscall.ENOMEM}[op]
			}
			_, _, path := server(t, d, Options{})
			c := open(t, path, form, nbdwire.ContextAllocation)
			check := func(a answer, errno uint32, msg string) {
				t.Helper()
				if a.errno != errno || structured && a.msg != msg {
					t.Errorf("form=%d workers=%v: %d %q, want %d %q", form, workers, a.errno, a.msg, errno, msg)
				}
			}
			check(c.do(rd(0, 512)), nbdwire.EIO, "reading from file failed")
			check(c.do(wr(0, 512), make([]byte, 512)...), nbdwire.ENOSPC, "writing to file failed")
			check(c.do(req(nbdwire.CmdWriteZeroes, 0, 512, nil)), nbdwire.EPERM, "writing to file failed")
			check(c.do(req(nbdwire.CmdFlush, 0, 0, nil)), nbdwire.EIO, "flush failed")
			check(c.do(req(nbdwire.CmdTrim, 0, 512, nil)), nbdwire.ENOTSUP, "discard failed")
			if structured {
				check(c.do(req(nbdwire.CmdBlockStatus, 0, 512, nil)), nbdwire.ENOMEM, "can't get block status")
			}
			if structured && !workers {
				check(c.do(rd(0, 65536)), nbdwire.ENOMEM, "unable to check for holes: Cannot allocate memory")
			} else { // with workers it would have to wait for the status
				check(c.do(rd(0, 65536)), nbdwire.EIO, "reading from file failed")
			}
		}
	}
}

func TestBlockStatus(t *testing.T) {
	d := newFileDevice(t, 16<<20)
	// Layers of 64 KiB: in none, in the first, first, second, ...
	var short atomic.Bool
	d.depths = func(off int64) (int64, int) {
		if short.Load() {
			return 0, 0
		}
		k := off / 65536
		return 65536 - off%65536, []int{0, 1, 1, 2}[k%4]
	}
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured, nbdwire.ContextAllocation, nbdwire.ContextDepth)
	a := c.do(req(nbdwire.CmdBlockStatus, 100, 4*65536, nil))
	const hz = nbdwire.StateHole | nbdwire.StateZero
	want := map[uint32][]nbdwire.Extent{
		idAllocation: {{N: 65436, Flags: hz}, {N: 3 * 65536}, {N: 100, Flags: hz}},
		idDepth:      {{N: 65436}, {N: 2 * 65536, Flags: 1}, {N: 65536, Flags: 2}, {N: 100}},
	}
	if a.errno != 0 || fmt.Sprint(a.extents) != fmt.Sprint(want) {
		t.Errorf("%d %s\n%v, want\n%v", a.errno, a.msg, a.extents, want)
	}
	a = c.do(req(nbdwire.CmdBlockStatus, 65536, 5*65536, []uint16{nbdwire.CmdFlagReqOne}))
	want = map[uint32][]nbdwire.Extent{idAllocation: {{N: 3 * 65536}}, idDepth: {{N: 2 * 65536, Flags: 1}}}
	if a.errno != 0 || fmt.Sprint(a.extents) != fmt.Sprint(want) {
		t.Errorf("one: %d %s %v", a.errno, a.msg, a.extents)
	}
	// A device that became shorter: an error, not an endless search.
	short.Store(true)
	if a = c.do(req(nbdwire.CmdBlockStatus, 0, 65536, nil)); a.errno == 0 {
		t.Error("no error beyond the end")
	}
}

func TestExtentsLimit(t *testing.T) {
	i := 0
	ask := func(off, n int64) (int64, uint64, error) { i++; return 1, uint64(off / 2 % 2), nil }
	es, err := extents(0, 100, 3, 100, ask)
	if err != nil || fmt.Sprint(es) != "[{2 0} {2 1} {2 0}]" || i != 7 {
		t.Errorf("%v %v after %d questions", es, err, i)
	}
}

// A file that ends in the middle of a mapped read: the client gets zeroes and an error
// with the offset, and the connection lives; without structured replies it is dropped.
func TestShortSendfile(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	c.do(wr(0, 1<<20), pattern(1<<20, 0)...)
	c.do(rd(0, 65536)) // the device remembers that all is data
	if err := d.f.Truncate(300000); err != nil {
		t.Fatal(err)
	}
	for _, f := range []uint16{0, nbdwire.CmdFlagDF} {
		a := c.do(rd(0, 1<<20, f))
		if a.errno != nbdwire.EIO || a.errOff != 300000 || a.msg != msgRead {
			t.Errorf("%d at %d: %q", a.errno, a.errOff, a.msg)
		}
		if !bytes.Equal(a.data[:300000], pattern(1<<20, 0)[:300000]) || !blk.IsZero(a.data[300000:]) {
			t.Error("data before the error differ, or no zeroes after it")
		}
	}
	if a := c.do(rd(0, 4096)); a.errno != 0 {
		t.Errorf("afterwards: %d", a.errno)
	}
	s := open(t, path, nbdwire.Simple)
	q := rd(0, 1<<20)
	s.put(q.Append(nil))
	s.take(nbdwire.SimpleSize + 300000)
	s.eof()
}

func TestLeases(t *testing.T) {
	d := newFileDevice(t, 8<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	c.do(wr(0, 8<<20), pattern(8<<20, 0)...)
	q := rd(0, 1<<20)
	c.put(q.Append(nil))
	c.r.Peek(1)
	if d.leases.Load() == 0 {
		t.Error("no lease while the data are in the socket")
	}
	eventually(t, "the pass ends though the client does not read", func() bool { return d.inside.Load() == 0 })
	c.reply(q)
	eventually(t, "the lease ends when the client has read all", func() bool { return d.leases.Load() == 0 })

	// A connection that is dropped keeps its leases until the client has read or gone.
	c.put(q.Append(nil))
	c.r.Peek(1)
	c.nc.Close()
	eventually(t, "the lease ends with the client", func() bool { return d.leases.Load() == 0 })
}

// The hot paths allocate nothing.
func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	d := newFileDevice(t, 4<<20)
	_, _, path := server(t, d, Options{})
	c := open(t, path, nbdwire.Structured)
	c.do(wr(0, 4<<20), pattern(4<<20, 0)...)
	for _, x := range []struct {
		name  string
		q     nbdwire.Request
		reply int
	}{
		{"read 4k", rd(4096, 4096), nbdwire.DataHeadSize + 4096},
		{"write 4k", wr(4096, 4096), nbdwire.SimpleSize},
		{"mapped read 256k", rd(0, 256<<10), nbdwire.DataHeadSize + 256<<10 + nbdwire.ChunkSize},
	} {
		out := x.q.Append(nil)
		if x.q.Cmd == nbdwire.CmdWrite {
			out = append(out, make([]byte, x.q.Len)...)
		}
		in := make([]byte, x.reply)
		once := func() {
			c.nc.Write(out)
			for n := 0; n < len(in); {
				k, err := c.nc.Read(in[n:])
				if err != nil {
					t.Fatal(err)
				}
				n += k
			}
		}
		for range 100 {
			once()
		}
		if n := testing.AllocsPerRun(500, once); n > 0.05 {
			t.Errorf("%s: %v allocations", x.name, n)
		}
	}
}
