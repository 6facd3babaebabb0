package nbd

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"qblockd/blockdev/nbd/wire"
)

// Metadata context ids, as told to clients.
const (
	idAllocation = 0
	idDepth      = 1
	idBitmap     = 2 // of the first bitmap; the others follow
)

// contexts are the metadata contexts a client chose for one export.
type contexts struct {
	exp               *Export
	allocation, depth bool
	bitmaps           []bool // of Spec.Bitmaps; nil: none
}

func (x *contexts) count() int {
	n := 0
	if x.allocation {
		n++
	}
	if x.depth {
		n++
	}
	for _, b := range x.bitmaps {
		if b {
			n++
		}
	}
	return n
}

// errAbort: the client ended the handshake as it should.
var errAbort = errors.New("aborted by the client")

// handshake negotiates; afterwards c.exp is set and c is its client. The data of options
// are read in full before they are looked at, so one that has to be refused leaves the
// stream in order. Source: proto.md, Fixed newstyle negotiation.
func (c *conn) handshake() error {
	if d := c.srv.opts.Handshake; d > 0 {
		c.nc.SetDeadline(time.Now().Add(d))
		defer c.nc.SetDeadline(time.Time{})
	}
	if err := c.send(wire.AppendGreeting(nil, wire.FixedNewstyle|wire.NoZeroes)); err != nil {
		return err
	}
	var b [4]byte
	if err := c.readFull(b[:]); err != nil {
		return err
	}
	flags := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	if flags&^uint32(wire.FixedNewstyle|wire.NoZeroes) != 0 {
		return fmt.Errorf("Unknown client flags 0x%x received", flags)
	}
	h := hs{conn: c, fixed: flags&uint32(wire.FixedNewstyle) != 0, noZeroes: flags&uint32(wire.NoZeroes) != 0}
	for {
		over, err := h.option()
		if over || err != nil {
			return err
		}
	}
}

// hs is the state of one handshake.
type hs struct {
	*conn
	fixed, noZeroes bool
	out             []byte // replies to the current option
}

// maxOptionData is what an option's data may take: an export's name and 64 Ki queries or
// information requests of ordinary length. The protocol allows any length; the reference
// takes 32 MiB piece by piece, we answer more than this with an error.
const maxOptionData = 1 << 20

// option handles one option; over tells that transmission begins.
func (h *hs) option() (over bool, err error) {
	var b [wire.OptionSize]byte
	if err := h.readFull(b[:]); err != nil {
		return false, err
	}
	o, err := wire.ParseOption(b[:])
	if err != nil {
		return false, errors.New("Bad magic received")
	}
	if o.Len > wire.MaxPayload {
		return false, fmt.Errorf("len (%d) is larger than max len (%d)", o.Len, wire.MaxPayload)
	}
	if o.Opt == wire.OptExportName {
		return true, h.exportName(o)
	}
	if !h.fixed {
		return false, fmt.Errorf("Unsupported option %d (%s)", o.Opt, wire.OptName(o.Opt))
	}
	h.out = h.out[:0]
	if needsData(o.Opt) && o.Len <= maxOptionData {
		data := make([]byte, o.Len)
		if err := h.readFull(data); err != nil {
			return false, err
		}
		over, err = h.withData(o, data)
	} else {
		if err := h.skip(int64(o.Len)); err != nil {
			return false, err
		}
		err = h.withoutData(o)
	}
	if errors.Is(err, errAbort) {
		h.send(h.out) // a client need not wait for it
		return false, err
	}
	if err == nil || len(h.out) > 0 {
		if e := h.send(h.out); e != nil {
			err = e
		}
	}
	if over && err != nil && h.exp != nil {
		h.exp.detach(h.conn)
		h.exp = nil
	}
	return over, err
}

func needsData(opt uint32) bool {
	switch opt {
	case wire.OptInfo, wire.OptGo, wire.OptListMetaContext, wire.OptSetMetaContext:
		return true
	}
	return false
}

func (h *hs) reply(opt, typ uint32) { h.out = wire.AppendOptReply(h.out, opt, typ, nil) }

func (h *hs) refuse(opt, typ uint32, format string, a ...any) {
	h.out = wire.AppendOptReply(h.out, opt, typ, fmt.Appendf(nil, format, a...))
}

// withoutData handles options without data, and all that are refused.
func (h *hs) withoutData(o wire.Option) error {
	switch o.Opt {
	case wire.OptList, wire.OptStartTLS, wire.OptStructuredReply:
		if o.Len > 0 {
			h.refuse(o.Opt, wire.RepErrInvalid, "option '%s' has unexpected length", wire.OptName(o.Opt))
			return nil
		}
	}
	switch o.Opt {
	case wire.OptAbort:
		h.reply(o.Opt, wire.RepAck)
		return errAbort
	case wire.OptList:
		for _, e := range h.srv.exports() {
			h.out = wire.AppendServer(h.out, e.spec.Name, e.spec.Description)
		}
		h.reply(o.Opt, wire.RepAck)
	case wire.OptStartTLS:
		h.refuse(o.Opt, wire.RepErrPolicy, "TLS not configured")
	case wire.OptStructuredReply:
		if h.structured {
			h.refuse(o.Opt, wire.RepErrInvalid, "structured reply already negotiated")
			break
		}
		h.structured = true
		h.reply(o.Opt, wire.RepAck)
	case wire.OptInfo, wire.OptGo, wire.OptListMetaContext, wire.OptSetMetaContext:
		h.refuse(o.Opt, wire.RepErrTooBig, "data of option %s is too long", wire.OptName(o.Opt))
	default:
		h.refuse(o.Opt, wire.RepErrUnsup, "Unsupported option %d (%s)", o.Opt, wire.OptName(o.Opt))
	}
	return nil
}

// withData handles options whose data matter.
func (h *hs) withData(o wire.Option, data []byte) (over bool, err error) {
	switch o.Opt {
	case wire.OptInfo, wire.OptGo:
		return h.info(o, data)
	default:
		h.metaContext(o, data)
		return false, nil
	}
}

// refuseData words what is wrong with the data of an option.
func (h *hs) refuseData(opt uint32, err error) {
	name := wire.OptName(opt)
	var long wire.NameLengthError
	switch {
	case errors.As(err, &long):
		h.refuse(opt, wire.RepErrInvalid, "Invalid name length: %d", uint32(long))
	case errors.Is(err, wire.ErrNUL):
		h.refuse(opt, wire.RepErrInvalid, "Unexpected embedded NUL in option %s", name)
	case errors.Is(err, wire.ErrTrailing):
		h.refuse(opt, wire.RepErrInvalid, "option '%s' has unexpected length", name)
	default:
		h.refuse(opt, wire.RepErrInvalid, "Inconsistent lengths in option %s", name)
	}
}

func (h *hs) refuseName(opt uint32, name string) {
	if len(name) >= 80 {
		name = name[:80] + "..."
	}
	h.refuse(opt, wire.RepErrUnknown, "export '%s' not present", name)
}

// info handles OptInfo and OptGo.
func (h *hs) info(o wire.Option, data []byte) (over bool, err error) {
	q, err := wire.ParseInfoRequest(data)
	if err != nil {
		h.refuseData(o.Opt, err)
		return false, nil
	}
	exp := h.srv.find(q.Name)
	if exp == nil {
		h.refuseName(o.Opt, q.Name)
		return false, nil
	}
	sendName, blockSize := false, false
	for _, i := range q.Infos {
		sendName = sendName || i == wire.InfoName
		blockSize = blockSize || i == wire.InfoBlockSize
	}
	item := func(i wire.Info) { h.out = i.AppendReply(h.out, o.Opt) }
	if sendName {
		item(wire.Info{Type: wire.InfoName, Text: q.Name})
	}
	if exp.spec.HasDescription {
		item(wire.Info{Type: wire.InfoDescription, Text: exp.spec.Description})
	}
	// The smallest block is told only to clients that will heed it.
	lim := exp.spec.Device.Limits()
	align := uint32(max(lim.RequestAlign, 1))
	least := uint32(1)
	if o.Opt == wire.OptInfo || blockSize {
		least = align
	}
	most := uint32(wire.MaxPayload)
	if lim.MaxTransfer > 0 && lim.MaxTransfer < wire.MaxPayload {
		most = uint32(lim.MaxTransfer)
	}
	item(wire.Info{Type: wire.InfoBlockSize, Min: least, Preferred: max(4096, least), Max: most})
	item(wire.Info{Type: wire.InfoExport, Size: uint64(exp.spec.Size), Flags: h.exportFlags(exp)})
	if o.Opt == wire.OptInfo {
		if !blockSize && align > 1 {
			h.refuse(o.Opt, wire.RepErrBlockSizeReqd, "request NBD_INFO_BLOCK_SIZE to use this export")
			return false, nil
		}
		h.reply(o.Opt, wire.RepAck)
		return false, nil
	}
	// A client of the export from before the acknowledgement is sent: who has read it
	// counts for a safe removal.
	if exp.attach(h.conn) != nil {
		h.out = h.out[:0]
		h.refuseName(o.Opt, q.Name)
		return false, nil
	}
	h.enter(exp)
	h.reply(o.Opt, wire.RepAck)
	return true, nil
}

// enter makes exp, to which c is attached, the one of the transmission.
func (h *hs) enter(exp *Export) {
	h.exp, h.dev = exp, exp.spec.Device
	if h.ctxs.exp != exp {
		h.ctxs = contexts{}
	}
}

func (h *hs) exportFlags(e *Export) uint16 {
	if h.structured {
		return e.flags | wire.FlagDF
	}
	return e.flags
}

// exportName handles OptExportName, whose only answer to an error is to hang up.
func (h *hs) exportName(o wire.Option) error {
	if o.Len > wire.MaxString {
		return errors.New("Bad length received")
	}
	name := make([]byte, o.Len)
	if err := h.readFull(name); err != nil {
		return err
	}
	exp := h.srv.find(string(name))
	if exp == nil || exp.attach(h.conn) != nil {
		return errors.New("export not found")
	}
	h.enter(exp)
	b := make([]byte, wire.ExportNameReply+wire.ExportNamePadding)
	put64(b, uint64(exp.spec.Size))
	put16(b[8:], h.exportFlags(exp))
	if h.noZeroes {
		b = b[:wire.ExportNameReply]
	}
	if err := h.send(b); err != nil {
		exp.detach(h.conn)
		h.exp = nil
		return err
	}
	return nil
}

// metaContext handles OptListMetaContext and OptSetMetaContext.
func (h *hs) metaContext(o wire.Option, data []byte) {
	list := o.Opt == wire.OptListMetaContext
	if !h.structured && !list {
		h.refuse(o.Opt, wire.RepErrInvalid, "request option '%s' when structured reply is not negotiated",
			wire.OptName(o.Opt))
		return
	}
	var local contexts
	x := &local
	if !list {
		x = &h.ctxs
		*x = contexts{}
	}
	q, err := wire.ParseMetaQueries(data)
	if err != nil {
		h.refuseData(o.Opt, err)
		return
	}
	exp := h.srv.find(q.Name)
	if exp == nil {
		h.refuseName(o.Opt, q.Name)
		return
	}
	n, err := q.Count()
	if err != nil {
		h.refuseData(o.Opt, err)
		return
	}
	chosen := contexts{bitmaps: make([]bool, len(exp.spec.Bitmaps))}
	if list && n == 0 {
		chosen.allocation, chosen.depth = true, true
		chosen.chooseBitmaps(exp, "")
	}
	for range n {
		query, ok, err := q.Next()
		if err != nil {
			h.refuseData(o.Opt, err)
			return
		}
		if !ok {
			continue
		}
		switch query {
		case wire.ContextAllocation:
			chosen.allocation = true
		case wire.ContextDepth:
			chosen.depth = true
		case "base:":
			chosen.allocation = chosen.allocation || list
		case "qemu:":
			if list {
				chosen.depth = true
				chosen.chooseBitmaps(exp, "")
			}
		default:
			if name, ok := strings.CutPrefix(query, wire.ContextBitmap); ok && (name != "" || list) {
				chosen.chooseBitmaps(exp, name)
			}
		}
	}
	chosen.exp = exp
	chosen.depth = chosen.depth && exp.spec.AllocationDepth
	id := func(i uint32) uint32 {
		if list {
			return 0
		}
		return i
	}
	if chosen.allocation {
		h.out = wire.AppendMetaContext(h.out, o.Opt, id(idAllocation), wire.ContextAllocation)
	}
	if chosen.depth {
		h.out = wire.AppendMetaContext(h.out, o.Opt, id(idDepth), wire.ContextDepth)
	}
	for i, b := range chosen.bitmaps {
		if b {
			h.out = wire.AppendMetaContext(h.out, o.Opt, id(idBitmap+uint32(i)), wire.ContextBitmap+exp.spec.Bitmaps[i].Name)
		}
	}
	h.reply(o.Opt, wire.RepAck)
	*x = chosen
}

// chooseBitmaps chooses the bitmaps of that name; all for "".
func (x *contexts) chooseBitmaps(exp *Export, name string) {
	for i, b := range exp.spec.Bitmaps {
		if name == "" || b.Name == name {
			x.bitmaps[i] = true
		}
	}
}

// readFull fills b from the client.
func (c *conn) readFull(b []byte) error {
	n := copy(b, c.in[c.r:c.w])
	c.r += n
	if n == len(b) {
		return nil
	}
	_, err := io.ReadFull(c.nc, b[n:])
	return err
}

// skip drops n bytes from the client.
func (c *conn) skip(n int64) error {
	k := min(n, int64(c.w-c.r))
	c.r += int(k)
	if n -= k; n == 0 {
		return nil
	}
	_, err := io.CopyN(io.Discard, c.nc, n)
	return err
}
