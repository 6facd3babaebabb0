package nbd

import (
	"math"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// maxExtents bounds the extents of one context in a reply: 1 MiB of them.
const maxExtents = 1 << 20 / nbdwire.ExtentSize

// serveStatus answers a block-status request for the contexts the client chose.
func (s *session) serveStatus(r *blk.Req, q *nbdwire.Request) *reply {
	limit := maxExtents
	if q.Flags&nbdwire.CmdFlagReqOne != 0 {
		limit = 1
	}
	p := newReply()
	p.head = make([]byte, 0, 64)
	left := s.ctxs.count()
	add := func(id uint32, ask func(off, n int64) (int64, uint32, error)) error {
		es, err := extents(int64(q.Off), int64(q.Len), limit, ask)
		if err != nil {
			return err
		}
		var flags uint16
		if left--; left == 0 {
			flags = nbdwire.ChunkDone
		}
		p.head = nbdwire.AppendBlockStatus(p.head, flags, q.Cookie, id, es)
		return nil
	}
	var err error
	if s.ctxs.allocation {
		err = add(idAllocation, func(off, n int64) (int64, uint32, error) {
			x, err := s.status(r, off, n)
			var f uint32
			if !x.Data {
				f |= nbdwire.StateHole
			}
			if x.Zero {
				f |= nbdwire.StateZero
			}
			return x.N, f, err
		})
	}
	if err == nil && s.ctxs.depth {
		err = add(idDepth, func(off, n int64) (int64, uint32, error) {
			x, err := s.status(r, off, n)
			return x.N, uint32(x.Depth), err
		})
	}
	for i := 0; err == nil && i < len(s.ctxs.bitmaps); i++ {
		if s.ctxs.bitmaps[i] {
			bits := s.exp.spec.Bitmaps[i].Bits
			err = add(idBitmap+uint32(i), func(off, n int64) (int64, uint32, error) {
				switch at, k, ok := bits.NextDirty(off, off+n); {
				case !ok:
					return n, 0, nil
				case at > off:
					return at - off, 0, nil
				default:
					return k, nbdwire.StateDirty, nil
				}
			})
		}
	}
	if err != nil {
		p.head = nbdwire.AppendError(p.head, q.Cookie, nbdwire.Errno(err), msgStatus)
	}
	return p
}

// extents asks about the range piece by piece, joining pieces with equal flags, until it is
// covered or more than limit extents would be needed.
func extents(off, n int64, limit int, ask func(off, n int64) (int64, uint32, error)) ([]nbdwire.Extent, error) {
	var es []nbdwire.Extent
	for n > 0 {
		k, f, err := ask(off, n)
		if err != nil {
			return nil, err
		}
		if l := len(es) - 1; l >= 0 && es[l].Flags == f && int64(es[l].N)+k <= math.MaxUint32 {
			es[l].N += uint32(k)
		} else {
			if len(es) == limit {
				break
			}
			es = append(es, nbdwire.Extent{N: uint32(k), Flags: f})
		}
		off, n = off+k, n-k
	}
	return es, nil
}
