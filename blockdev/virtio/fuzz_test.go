package virtio_test

import (
	"bytes"
	"encoding/binary"
	"math"
	"reflect"
	"testing"
	"unsafe"

	"qblockd/blockdev/virtio"
	"qblockd/blockdev/virtio/virtiotest"
)

// ringSize is the number of descriptors in FuzzRing, whose rings lie at the beginning of
// memory.
const (
	ringSize = 8
	ringMem  = 4096
)

var ringParts = virtio.Rings{Desc: 0, Driver: 128, Device: 160}

// ringSeeds adds rings as drivers write them, some with a step that follows.
func ringSeeds(f *testing.F) {
	ops := []byte{0, 0, 0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 6, 1, 2, 7, 0, 1, 2, 3}
	for i, v := range variants {
		g := virtiotest.NewGuest(f, 1<<20)
		g.Base, g.User = 0, 0
		d := virtiotest.NewDriver(g, ringSize, v.features)
		for typ := range uint32(3) {
			at := g.Alloc(64, 16)
			copy(g.At(at, 16), header(typ, 8))
			d.Add("", []virtiotest.Buf{
				{Addr: at, Len: 16}, {Addr: at + 16, Len: 16, Write: true}, {Addr: at + 32, Len: 1, Write: true},
			}, v.indirect)
		}
		// Where the rings are differs: what they refer to does not move.
		m := bytes.Clone(g.Mem[:ringMem])
		driver := bytes.Clone(g.At(d.Drv, 24))
		clear(m[128:256])
		copy(m[128:], driver)
		f.Add(uint8(i), bytes.Clone(m), ops)
		f.Add(uint8(i)|8, bytes.Clone(m), ops)
		f.Add(uint8(i)|8, bytes.Clone(m), []byte{0, 0, 7, 0, 1, 2, 7, 0, 0, 1, 1, 2})
		m[3], m[140] = 1, 9
		f.Add(uint8(i), m, ops)
	}
}

// FuzzRing has a device serve whatever is in memory, also in the area of what is in flight: nothing
// panics, nothing goes on for ever, and no memory but the guest's is touched.
func FuzzRing(f *testing.F) {
	ringSeeds(f)
	backing := make([]uint64, ringMem/8+2*ringSize*4)
	all := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(backing))), 8*len(backing))
	m := virtio.NewMapping(all[:ringMem], func([]byte) {})
	cut := virtio.Region{Size: 1 << 10, Mapping: m}
	rest := virtio.Region{Guest: 1 << 10, User: 1 << 10, Size: ringMem - 1<<10, Offset: 1 << 10, Mapping: m}
	mem, err := virtio.NewMemory([]virtio.Region{cut, rest})
	if err != nil {
		f.Fatal(err)
	}
	logBits := virtio.NewMapping(make([]byte, 64), func([]byte) {})
	log, err := virtio.NewLog(logBits)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind uint8, content, ops []byte) {
		clear(all)
		copy(all, content)
		v := variants[int(kind&7)%len(variants)]
		config := virtio.QueueConfig{Size: ringSize, Features: v.features, Memory: mem, Rings: ringParts}
		if v.features&virtio.FPacked != 0 {
			config.Base = 1<<15 | 1<<31
		}
		if kind&8 != 0 {
			config.Inflight = all[ringMem:]
		}
		serveOps(t, config, all[:ringMem], ops, log)
	})
}

// serveOps does to a queue what ops say.
func serveOps(t *testing.T, config virtio.QueueConfig, guest, ops []byte, log *virtio.Log) {
	q, err := virtio.NewQueue(config)
	if err != nil {
		return
	}
	var held []*virtio.Request
	for i, op := range ops {
		switch op & 7 {
		case 0:
			r := &virtio.Request{}
			ok, err := r.Pop(q, limits)
			if ok && err == nil {
				held = append(held, r)
				r.Data.Each(func(b []byte) { within(t, guest, b) })
			}
		case 1:
			if len(held) > 0 {
				_ = held[0].SetID("fuzz")
				_ = held[0].Finish(q, virtio.StatusOK)
				held = held[1:]
			}
		case 2:
			_, _ = q.Publish()
		case 3:
			_, _ = q.EnableKicks()
		case 4:
			_ = q.DisableKicks()
			_, _ = q.Pending()
		case 5:
			guest[(int(op)<<5^i*37)%len(guest)] ^= op
		case 6:
			_ = q.SetMemory(config.Memory)
			q.SetLog(log, op&8 != 0, uint64(op)<<8)
		case 7: // the device ends, and another comes
			for _, r := range held {
				r.Drop(q)
			}
			held = nil
			config.Base = q.Base()
			q.Close()
			if q, err = virtio.NewQueue(config); err != nil {
				return
			}
		}
		if len(held) > config.Size || q.InFlight() != len(held) {
			t.Fatalf("%d requests are held, %d in flight, in a queue of %d", len(held), q.InFlight(), config.Size)
		}
	}
	for _, r := range held {
		r.Drop(q)
	}
	q.Close()
}

// within fails if b is not a part of all.
func within(t *testing.T, all, b []byte) {
	off := uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(all)))
	if off >= uintptr(len(all)) || len(b) > len(all)-int(off) {
		t.Fatalf("%d bytes at %d of %d", len(b), off, len(all))
	}
}

// FuzzRequest sends a request in any pieces: what the device makes of it does not depend on them.
func FuzzRequest(f *testing.F) {
	for _, c := range requests {
		for _, cut := range []uint16{0, 1, 7, 300} {
			f.Add(c.out, uint16(c.in), cut)
		}
	}
	g := virtiotest.NewGuest(f, 1<<20)
	d := virtiotest.NewDriver(g, 8, virtio.FVersion1|virtio.FIndirect)
	k := &disk{g: g, d: d, q: newQueue(f, d, 2)}
	outAt, inAt := g.Alloc(4096, 1), g.Alloc(4096, 1)
	f.Fuzz(func(t *testing.T, out []byte, in, cut uint16) {
		n := int(in)%4096 + 1
		out = out[:min(len(out), 4096)]
		size := max(int(cut), (len(out)+n)/200+1)
		copy(g.At(outAt, 4096), out)
		var bufs []virtiotest.Buf
		for _, p := range []struct {
			at    uint64
			n     int
			write bool
		}{{outAt, len(out), false}, {inAt, n, true}} {
			for off := 0; off < p.n; off += size {
				bufs = append(bufs, virtiotest.Buf{Addr: p.at + uint64(off), Len: uint32(min(size, p.n-off)), Write: p.write})
			}
		}
		k.in = []virtiotest.Buf{{Addr: inAt, Len: uint32(n)}}
		if _, ok := d.Add("", bufs, true); !ok {
			t.Fatal("no room")
		}
		r := &virtio.Request{}
		if ok, err := r.Pop(k.q, limits); !ok || err != nil {
			t.Fatal(ok, err)
		}
		got := asked{op: r.Op, off: r.Off, n: r.N, status: r.Status}
		if r.Op != virtio.OpRefused {
			got.segments, got.status = append([]virtio.Segment(nil), r.Segments...), 0
		}
		if want := model(out, n); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
		k.answer(t, r, got.status)
	})
}

// model is what a request asks for, by its bytes in one piece.
func model(out []byte, in int) asked {
	le := binary.LittleEndian
	if len(out) < 16 {
		return asked{status: virtio.StatusIOErr}
	}
	typ, data := le.Uint32(out)&0x7fff_ffff, out[16:]
	// place is where a sector is, in bytes, if so many sectors more fit.
	place := func(sector, sectors uint64) (int64, bool) {
		ok := sector%8 == 0 && sector <= math.MaxInt64/512 && sector*512+sectors*512 <= math.MaxInt64
		return int64(sector * 512), ok
	}
	switch typ {
	case 0, 1:
		n, op := in-1, virtio.OpRead
		if typ == 1 {
			n, op = len(data), virtio.OpWrite
		}
		off, ok := place(le.Uint64(out[8:]), uint64(n)/512)
		if !ok || n%512 != 0 {
			return asked{status: virtio.StatusIOErr}
		}
		return asked{op: op, off: off, n: int64(n)}
	case 4:
		return asked{op: virtio.OpFlush}
	case 8:
		return asked{op: virtio.OpGetID}
	case 11, 13:
		op, most, sectorsMost := virtio.OpDiscard, 2, uint32(1000)
		if typ == 13 {
			op, most, sectorsMost = virtio.OpWriteZeroes, 1, 2000
		}
		if len(data) == 0 || len(data)%16 != 0 {
			return asked{status: virtio.StatusIOErr}
		}
		if len(data)/16 > most {
			return asked{status: virtio.StatusUnsupported}
		}
		r := asked{op: op}
		for ; len(data) > 0; data = data[16:] {
			sectors, flags := le.Uint32(data[8:]), le.Uint32(data[12:])
			off, ok := place(le.Uint64(data), uint64(sectors))
			if !ok || sectors > sectorsMost {
				return asked{status: virtio.StatusIOErr}
			}
			if flags > 1 || flags == 1 && typ == 11 {
				return asked{status: virtio.StatusUnsupported}
			}
			r.segments = append(r.segments, virtio.Segment{Off: off, N: int64(sectors) * 512, Unmap: flags == 1})
		}
		return r
	}
	return asked{status: virtio.StatusUnsupported}
}
