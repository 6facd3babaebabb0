package qcow2

import (
	"bytes"
	"compress/flate"
	"io"
	"sync"

	kflate "github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
)

// unzipped is the compressed cluster read last. data is never changed, only replaced.
type unzipped struct {
	entry uint64 // 0: none
	data  []byte
}

// readCompressed reads from byte in of the compressed cluster with L2 entry e.
func (s *requests) readCompressed(r *blk.Req, v blk.Vec, e uint64, in int64) error {
	if !s.lock(r) {
		return blk.ErrWouldBlock
	}
	s.locked()
	u := s.unz
	s.mu.Unlock()
	if u.entry != e {
		off, n := s.geo.CompressedRange(e)
		if err := s.unzipping.Take(r, n+s.cs); err != nil {
			return err
		}
		defer s.unzipping.Give(n + s.cs)
		raw := blk.GetBuf(int(n), 0)
		defer blk.PutBuf(raw)
		s.step(r, blk.EvReadCompressed)
		if err := s.readFile(r, blk.Buf(raw.B), off); err != nil {
			return err
		}
		u = unzipped{e, make([]byte, s.cs)}
		if err := s.decode(r, u.data, raw.B); err != nil {
			return err
		}
		// Nobody can have reused the bytes while this request holds its epoch, and who does so
		// later forgets what is kept here.
		if s.lock(r) {
			s.locked()
			s.unz = u
			s.mu.Unlock()
		}
	}
	v.CopyIn(u.data[in : in+v.Len()])
	return nil
}

// decode is decompress as far as there is memory for it.
func (s *requests) decode(r *blk.Req, dst, src []byte) error {
	need := int64(decoderSize[s.compression])
	if err := s.decoding.Take(r, need); err != nil {
		return err
	}
	defer s.decoding.Give(need)
	if decompress(s.compression, dst, src) != nil {
		return errIO
	}
	return nil
}

// What the requests of an image may take for buffers at the same time, in bytes: for compressing,
// for what is copied around writes to new clusters, for decompressing, and for the decoders. One
// request that is alone may exceed it.
const (
	budgetZip    = 32 << 20
	budgetCopy   = 32 << 20
	budgetUnzip  = 32 << 20
	budgetDecode = 64 << 20
	// maxWindow is what compressed data may make a decoder hold.
	maxWindow = 8 << 20
)

// decoderSize and encoderSize are what one of either kind takes, at most.
var (
	decoderSize = [...]int{layout.CompressionZlib: 64 << 10, layout.CompressionZstd: maxWindow}
	encoderSize = [...]int{layout.CompressionZlib: 1 << 20, layout.CompressionZstd: 8 << 20}
)

// pool keeps what make makes for the next who needs one. make does not fail: its options are
// constants.
func pool[T any](make func() (T, error)) *sync.Pool {
	return &sync.Pool{New: func() any {
		v, err := make()
		if err != nil {
			panic(err)
		}
		return v
	}}
}

var (
	inflaters    = pool(func() (io.ReadCloser, error) { return flate.NewReader(bytes.NewReader(nil)), nil })
	zstdDecoders = pool(func() (*zstd.Decoder, error) {
		return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(2*maxWindow))
	})
	// The format's readers inflate with a window of 4 KiB.
	deflaters    = pool(func() (*kflate.Writer, error) { return kflate.NewWriterWindow(io.Discard, 4096) })
	zstdEncoders = pool(func() (*zstd.Encoder, error) {
		return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true),
			zstd.WithWindowSize(2<<20), zstd.WithEncoderCRC(false))
	})
)

// decompress fills dst from src, which may be followed by garbage.
func decompress(kind uint8, dst, src []byte) error {
	if kind == layout.CompressionZstd {
		d := zstdDecoders.Get().(*zstd.Decoder)
		defer zstdDecoders.Put(d)
		if err := d.Reset(bytes.NewReader(src)); err != nil {
			return err
		}
		_, err := io.ReadFull(d, dst)
		return err
	}
	z := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(z)
	if err := z.(flate.Resetter).Reset(bytes.NewReader(src), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(z, dst)
	return err
}

// compress returns src compressed, or nil if that does not make it shorter than src.
func compress(kind uint8, src []byte) ([]byte, error) {
	var out []byte
	if kind == layout.CompressionZstd {
		e := zstdEncoders.Get().(*zstd.Encoder)
		defer zstdEncoders.Put(e)
		out = e.EncodeAll(src, nil)
	} else {
		var b bytes.Buffer
		z := deflaters.Get().(*kflate.Writer)
		defer deflaters.Put(z)
		z.Reset(&b)
		if _, err := z.Write(src); err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
		out = b.Bytes()
	}
	if len(out) >= len(src) {
		return nil, nil
	}
	return out, nil
}

// writeCompressed stores whole clusters compressed; clusters that do not shrink are written as they
// are. It fails with EIO for a cluster that has data of its own already, and with ErrNotSupported
// where data are in another file.
func (s *requests) writeCompressed(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	if s.external != nil || s.seal != nil { // compressed data are not encrypted
		return blk.ErrNotSupported
	}
	n := v.Len()
	if off&(s.cs-1) != 0 || n&(s.cs-1) != 0 && off+n != s.size.Load() {
		return errInval
	}
	if r.NoWait {
		return blk.ErrWouldBlock
	}
	need := 2*s.cs + int64(encoderSize[s.compression])
	if err := s.zipping.Take(r, need); err != nil {
		return err
	}
	defer s.zipping.Give(need)
	buf := make([]byte, s.cs)
	for done := int64(0); done < n; done += s.cs {
		part := v.Slice(done, min(s.cs, n-done))
		clear(buf[part.CopyOut(buf):])
		z, err := compress(s.compression, buf)
		switch {
		case err != nil:
			return errIO
		case z == nil:
			err = s.writeAt(r, part, off+done, f&^blk.Compressed)
		default:
			err = s.storeCompressed(r, z, off+done)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// storeCompressed makes z the compressed content of the cluster at off.
func (s *requests) storeCompressed(r *blk.Req, z []byte, off int64) error {
	a := &alloc{first: off >> s.cb, n: 1, zipped: int64(len(z))}
	if err := s.planCompressed(r, a); err != nil {
		return err
	}
	s.step(r, blk.EvWriteCompressed)
	return s.finish(r, a, s.file.WriteAt(r, blk.Buf(z), a.host, 0))
}

// planCompressed finds a place for the compressed data of a.
func (s *requests) planCompressed(r *blk.Req, a *alloc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if err := s.usable(); err != nil {
			return err
		}
		if err := s.room(r); err != nil {
			return err
		}
		if !s.waitInflight(a.first, 1) {
			break
		}
	}
	if err := s.setDirtyBit(r); err != nil {
		return err
	}
	t, err := s.sliceForWrite(r, a.first)
	if err != nil {
		return err
	}
	old := s.entry(t, s.l2Index(a.first))
	if old&layout.Copied != 0 {
		return errIO
	}
	if err := s.canFree(r, old); err != nil {
		return err
	}
	t.pins++
	a.host, err = s.allocBytes(r, a.zipped)
	t.pins--
	if err != nil {
		return err
	}
	s.unz = unzipped{}
	if err := s.checkOverlap(r, a.host, a.zipped, 0); err != nil {
		return err
	}
	s.inflight = append(s.inflight, a)
	return nil
}
