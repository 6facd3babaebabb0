package nbd

import (
	"math"
	"slices"
	"strings"

	"qblockd/blockdev/nbdwire"
	"qblockd/graph/blk"
)

// metaContext is a metadata context that an export offers.
type metaContext struct {
	id   uint32 // as told to clients
	name string
	// extent describes the first k bytes of a range by flags.
	extent func(s *session, r *blk.Req, off, n int64) (k int64, flags uint64, err error)
}

// Metadata context ids, as told to clients.
const (
	idAllocation = 0
	idDepth      = 1
	idBitmap     = 2 // of the first bitmap; the others follow
)

// contexts are those that an export offers, by their ids.
func contexts(spec *Spec) []metaContext {
	l := []metaContext{{idAllocation, nbdwire.ContextAllocation, allocation}}
	if spec.AllocationDepth {
		l = append(l, metaContext{idDepth, nbdwire.ContextDepth, depth})
	}
	for i, b := range spec.Bitmaps {
		l = append(l, metaContext{idBitmap + uint32(i), nbdwire.ContextBitmap + b.Name, b.extent})
	}
	return l
}

func allocation(s *session, r *blk.Req, off, n int64) (int64, uint64, error) {
	x, err := s.status(r, off, n)
	var f uint64
	if !x.Data {
		f |= nbdwire.StateHole
	}
	if x.Zero {
		f |= nbdwire.StateZero
	}
	return x.N, f, err
}

func depth(s *session, r *blk.Req, off, n int64) (int64, uint64, error) {
	x, err := s.status(r, off, n)
	return x.N, uint64(x.Depth), err
}

func (b Bitmap) extent(_ *session, _ *blk.Req, off, n int64) (int64, uint64, error) {
	switch at, k, ok := b.Bits.NextDirty(off, off+n); {
	case !ok:
		return n, 0, nil
	case at > off:
		return at - off, 0, nil
	default:
		return k, nbdwire.StateDirty, nil
	}
}

// matches tells whether a query asks for x. To list is to ask with wildcards, too: a namespace
// stands for all that is in it.
func (x *metaContext) matches(query string, list bool) bool {
	wildcard := query == "base:" || query == "qemu:" || query == nbdwire.ContextBitmap
	return query == x.name || list && wildcard && strings.HasPrefix(x.name, query)
}

// queried are those contexts of exp that the queries ask for. To list without any query is to ask
// for everything.
func queried(exp *Export, q *nbdwire.MetaQueries, list bool) (chosen []*metaContext, err error) {
	n, err := q.Count()
	if err != nil {
		return nil, err
	}
	asked := make([]bool, len(exp.contexts))
	for range n {
		query, ok, err := q.Next()
		if err != nil {
			return nil, err
		}
		for i := range asked {
			asked[i] = asked[i] || ok && exp.contexts[i].matches(query, list)
		}
	}
	for i := range asked {
		if asked[i] || list && n == 0 {
			chosen = append(chosen, &exp.contexts[i])
		}
	}
	return chosen, nil
}

// metaContext handles OptListMetaContext and OptSetMetaContext.
func (h *negotiation) metaContext(o nbdwire.Option, data []byte) {
	list := o.Opt == nbdwire.OptListMetaContext
	if !list {
		if h.form == nbdwire.Simple {
			h.refuse(o.Opt, nbdwire.RepErrInvalid, "request option '%s' when structured reply is not negotiated",
				nbdwire.OptName(o.Opt))
			return
		}
		h.ctxs = nil // also if it fails
	}
	q, err := nbdwire.ParseMetaQueries(data)
	if err != nil {
		h.refuseData(o.Opt, err)
		return
	}
	exp := h.srv.find(q.Name)
	if exp == nil {
		h.refuseName(o.Opt, q.Name)
		return
	}
	chosen, err := queried(exp, &q, list)
	if err != nil {
		h.refuseData(o.Opt, err)
		return
	}
	for _, x := range chosen {
		id := x.id
		if list {
			id = 0 // told of what is chosen only
		}
		h.out = nbdwire.AppendMetaContext(h.out, o.Opt, id, x.name)
	}
	h.reply(o.Opt, nbdwire.RepAck)
	if !list {
		h.ctxs, h.ctxsOf = chosen, exp
	}
}

// maxExtents bounds the extents of one context in a reply: 1 MiB of them.
const maxExtents = 1 << 20 / nbdwire.ExtentSize

// choose are those of the session's contexts that the payload of q names, and sets the range that q
// is about.
func (s *session) choose(q *nbdwire.Request, payload []byte) (chosen []*metaContext, ok bool) {
	n, ids, err := nbdwire.ParseStatusPayload(payload, nil)
	if err != nil || len(ids) == 0 {
		return nil, false
	}
	slices.Sort(ids)
	for _, x := range s.ctxs {
		if len(chosen) < len(ids) && ids[len(chosen)] == x.id {
			chosen = append(chosen, x)
		}
	}
	// One is missing that was not negotiated, or that was named twice.
	q.Len = n
	return chosen, len(chosen) == len(ids)
}

// serveStatus answers a block-status request for these contexts.
func (s *session) serveStatus(r *blk.Req, q *nbdwire.Request, ctxs []*metaContext) *reply {
	limit := maxExtents
	if q.Flags&nbdwire.CmdFlagReqOne != 0 {
		limit = 1
	}
	p := newReply()
	p.head = make([]byte, 0, 64)
	longest := int64(math.MaxUint32)
	if s.form == nbdwire.Extended {
		longest = math.MaxInt64
	}
	for i, x := range ctxs {
		es, err := extents(int64(q.Off), int64(q.Len), limit, longest, func(off, n int64) (int64, uint64, error) {
			return x.extent(s, r, off, n)
		})
		if err != nil {
			p.head = s.form.AppendError(p.head, q, nbdwire.Errno(err), msgStatus)
			break
		}
		var flags uint16
		if i == len(ctxs)-1 {
			flags = nbdwire.ChunkDone
		}
		p.head = s.form.AppendBlockStatus(p.head, flags, q, x.id, es)
	}
	return p
}

// extents asks about the range piece by piece, joining pieces with equal flags up to longest bytes,
// until it is covered, more than limit extents would be needed, or it has asked so often that the
// client had better ask again.
func extents(off, n int64, limit int, longest int64,
	ask func(off, n int64) (int64, uint64, error)) ([]nbdwire.Extent, error) {
	var es []nbdwire.Extent
	for asked := 0; n > 0 && asked < maxExtents; asked++ {
		k, f, err := ask(off, n)
		if err != nil {
			return nil, err
		}
		if l := len(es) - 1; l >= 0 && es[l].Flags == f && int64(es[l].N)+k <= longest {
			es[l].N += uint64(k)
		} else {
			if len(es) == limit {
				break
			}
			es = append(es, nbdwire.Extent{N: uint64(k), Flags: f})
		}
		off, n = off+k, n-k
	}
	return es, nil
}
