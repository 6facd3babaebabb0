package nbd

import (
	"strings"

	"qblockd/blockdev/nbdwire"
)

// Metadata context ids, as told to clients.
const (
	idAllocation = 0
	idDepth      = 1
	idBitmap     = 2 // of the first bitmap; the others follow
)

// contexts are metadata contexts of one export, as a client has listed or chosen them.
type contexts struct {
	exp               *Export
	allocation, depth bool
	bitmaps           []bool // of Spec.Bitmaps; nil: none
}

// count is how many are chosen.
func (x *contexts) count() int {
	n := 0
	for _, chosen := range [...]bool{x.allocation, x.depth} {
		if chosen {
			n++
		}
	}
	for _, chosen := range x.bitmaps {
		if chosen {
			n++
		}
	}
	return n
}

// queried are those contexts of exp that the queries ask for. To list is to ask with wildcards,
// too: a namespace stands for all that is in it, and no query at all for everything.
func queried(exp *Export, q *nbdwire.MetaQueries, list bool) (x contexts, err error) {
	n, err := q.Count()
	if err != nil {
		return x, err
	}
	x = contexts{exp: exp, bitmaps: make([]bool, len(exp.spec.Bitmaps))}
	if list && n == 0 {
		x.choose("base:", true)
		x.choose("qemu:", true)
	}
	for range n {
		query, ok, err := q.Next()
		if err != nil {
			return x, err
		}
		if ok {
			x.choose(query, list)
		}
	}
	return x, nil
}

// choose adds what one query asks for.
func (x *contexts) choose(query string, list bool) {
	all := list && query == "qemu:"
	if query == nbdwire.ContextAllocation || list && query == "base:" {
		x.allocation = true
	}
	if query == nbdwire.ContextDepth || all {
		x.depth = x.exp.spec.AllocationDepth
	}
	name, ok := strings.CutPrefix(query, nbdwire.ContextBitmap)
	all = all || list && ok && name == ""
	for i, b := range x.exp.spec.Bitmaps {
		if all || ok && name != "" && b.Name == name {
			x.bitmaps[i] = true
		}
	}
}

// metaContext handles OptListMetaContext and OptSetMetaContext.
func (h *negotiation) metaContext(o nbdwire.Option, data []byte) {
	list := o.Opt == nbdwire.OptListMetaContext
	if !list {
		if !h.structured {
			h.refuse(o.Opt, nbdwire.RepErrInvalid, "request option '%s' when structured reply is not negotiated",
				nbdwire.OptName(o.Opt))
			return
		}
		h.ctxs = contexts{} // also if it fails
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
	x, err := queried(exp, &q, list)
	if err != nil {
		h.refuseData(o.Opt, err)
		return
	}
	h.tell(o.Opt, &x)
	if !list {
		h.ctxs = x
	}
}

// tell answers with the contexts x; ids are told of those that are chosen, not of those that are
// listed.
func (h *negotiation) tell(opt uint32, x *contexts) {
	item := func(id int, name string) {
		if opt == nbdwire.OptListMetaContext {
			id = 0
		}
		h.out = nbdwire.AppendMetaContext(h.out, opt, uint32(id), name)
	}
	if x.allocation {
		item(idAllocation, nbdwire.ContextAllocation)
	}
	if x.depth {
		item(idDepth, nbdwire.ContextDepth)
	}
	for i, chosen := range x.bitmaps {
		if chosen {
			item(idBitmap+i, nbdwire.ContextBitmap+x.exp.spec.Bitmaps[i].Name)
		}
	}
	h.reply(opt, nbdwire.RepAck)
}
