package nbd

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"qblockd/blockdev/nbdwire"
)

// errAbort: the client ended the handshake as it should.
var errAbort = errors.New("aborted by the client")

// handshake negotiates; afterwards c.session is set and c is a client of its export. The data of
// options are read in full before they are looked at, so one that has to be refused leaves the
// stream in order. Source: proto.md, Fixed newstyle negotiation.
func (c *conn) handshake() error {
	if d := c.srv.opts.Handshake; d > 0 {
		c.nc.SetDeadline(time.Now().Add(d))
		defer c.nc.SetDeadline(time.Time{})
	}
	h := negotiation{conn: c}
	if err := h.send(nbdwire.AppendGreeting(nil, nbdwire.FixedNewstyle|nbdwire.NoZeroes)); err != nil {
		return err
	}
	var b [4]byte
	if err := h.read(b[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(nbdwire.FixedNewstyle|nbdwire.NoZeroes) != 0 {
		return fmt.Errorf("Unknown client flags 0x%x received", flags)
	}
	h.fixed, h.noZeroes = flags&uint32(nbdwire.FixedNewstyle) != 0, flags&uint32(nbdwire.NoZeroes) != 0
	for {
		over, err := h.option()
		if over || err != nil {
			return err
		}
	}
}

// negotiation is the state of one handshake.
type negotiation struct {
	*conn
	fixed, noZeroes bool
	out             []byte  // replies to the current option
	ctxsOf          *Export // that ctxs are of
}

// read fills b from the client.
func (h *negotiation) read(b []byte) error {
	_, err := io.ReadFull(h.nc, b)
	return err
}

func (h *negotiation) send(b []byte) error {
	_, err := h.nc.Write(b)
	return err
}

// maxOptionData is what an option's data may take: an export's name and 64 Ki queries or
// information requests of ordinary length. The protocol allows any length; QEMU takes 32 MiB piece
// by piece, we answer more than this with an error.
const maxOptionData = 1 << 20

// option handles one option; over tells that transmission begins.
func (h *negotiation) option() (over bool, err error) {
	var b [nbdwire.OptionSize]byte
	if err := h.read(b[:]); err != nil {
		return false, err
	}
	o, err := nbdwire.ParseOption(b[:])
	if err != nil {
		return false, errors.New("Bad magic received")
	}
	if o.Len > nbdwire.MaxPayload {
		return false, fmt.Errorf("len (%d) is larger than max len (%d)", o.Len, nbdwire.MaxPayload)
	}
	if h.srv.opts.TLS != nil && !h.tls {
		return false, h.beforeTLS(o)
	}
	if o.Opt == nbdwire.OptExportName {
		return true, h.exportName(o)
	}
	if !h.fixed {
		return false, fmt.Errorf("Unsupported option %d (%s)", o.Opt, nbdwire.OptName(o.Opt))
	}
	h.out = h.out[:0]
	if needsData(o.Opt) && o.Len <= maxOptionData {
		data := make([]byte, o.Len)
		if err := h.read(data); err != nil {
			return false, err
		}
		if o.Opt == nbdwire.OptInfo || o.Opt == nbdwire.OptGo {
			over = h.info(o, data)
		} else {
			h.metaContext(o, data)
		}
	} else {
		if _, err := io.CopyN(io.Discard, h.nc, int64(o.Len)); err != nil {
			return false, err
		}
		h.withoutData(o)
	}
	err = h.send(h.out)
	if o.Opt == nbdwire.OptAbort {
		err = errAbort // a client need not wait for the answer
	}
	return over, err
}

// beforeTLS handles an option of a client that has to ask for TLS first.
func (h *negotiation) beforeTLS(o nbdwire.Option) error {
	switch {
	case !h.fixed:
		return fmt.Errorf("Unsupported option 0x%x", o.Opt)
	case o.Opt == nbdwire.OptExportName:
		return fmt.Errorf("Option 0x%x not permitted before TLS", o.Opt)
	}
	if _, err := io.CopyN(io.Discard, h.nc, int64(o.Len)); err != nil {
		return err
	}
	h.out = h.out[:0]
	switch {
	case o.Opt == nbdwire.OptStartTLS && o.Len == 0:
		h.reply(o.Opt, nbdwire.RepAck)
	case o.Opt == nbdwire.OptStartTLS:
		h.withoutData(o)
	default:
		h.refuse(o.Opt, nbdwire.RepErrTLSReqd, "Option 0x%x not permitted before TLS", o.Opt)
	}
	err := h.send(h.out)
	switch {
	case o.Opt == nbdwire.OptAbort:
		return errAbort
	case o.Opt != nbdwire.OptStartTLS || err != nil:
		return err
	case o.Len > 0:
		return errors.New("option 'starttls' has unexpected length")
	}
	return h.startTLS()
}

func needsData(opt uint32) bool {
	switch opt {
	case nbdwire.OptInfo, nbdwire.OptGo, nbdwire.OptListMetaContext, nbdwire.OptSetMetaContext:
		return true
	}
	return false
}

func (h *negotiation) reply(opt, typ uint32) { h.out = nbdwire.AppendOptReply(h.out, opt, typ, nil) }

func (h *negotiation) refuse(opt, typ uint32, format string, a ...any) {
	h.out = nbdwire.AppendOptReply(h.out, opt, typ, fmt.Appendf(nil, format, a...))
}

// withoutData handles options without data, and all that are refused.
func (h *negotiation) withoutData(o nbdwire.Option) {
	switch o.Opt {
	case nbdwire.OptList, nbdwire.OptStartTLS, nbdwire.OptStructuredReply, nbdwire.OptExtendedHeaders:
		if o.Len > 0 {
			h.refuse(o.Opt, nbdwire.RepErrInvalid, "option '%s' has unexpected length", nbdwire.OptName(o.Opt))
			return
		}
	}
	switch o.Opt {
	case nbdwire.OptAbort:
		h.reply(o.Opt, nbdwire.RepAck)
	case nbdwire.OptList:
		for _, e := range h.srv.exports() {
			h.out = nbdwire.AppendServer(h.out, e.spec.Name, e.spec.Description)
		}
		h.reply(o.Opt, nbdwire.RepAck)
	case nbdwire.OptStartTLS:
		if h.tls {
			h.refuse(o.Opt, nbdwire.RepErrInvalid, "TLS already enabled")
			break
		}
		h.refuse(o.Opt, nbdwire.RepErrPolicy, "TLS not configured")
	case nbdwire.OptStructuredReply, nbdwire.OptExtendedHeaders:
		h.replyForm(o.Opt)
	case nbdwire.OptInfo, nbdwire.OptGo, nbdwire.OptListMetaContext, nbdwire.OptSetMetaContext:
		h.refuse(o.Opt, nbdwire.RepErrTooBig, "data of option %s is too long", nbdwire.OptName(o.Opt))
	default:
		h.refuse(o.Opt, nbdwire.RepErrUnsup, "Unsupported option %d (%s)", o.Opt, nbdwire.OptName(o.Opt))
	}
}

// replyForm handles OptStructuredReply and OptExtendedHeaders.
func (h *negotiation) replyForm(opt uint32) {
	form := nbdwire.Structured
	if opt == nbdwire.OptExtendedHeaders {
		form = nbdwire.Extended
	}
	switch {
	case h.form < form:
		h.form = form
		h.reply(opt, nbdwire.RepAck)
	case form == nbdwire.Extended:
		h.refuse(opt, nbdwire.RepErrInvalid, "extended headers already negotiated")
	case h.form == nbdwire.Extended:
		h.refuse(opt, nbdwire.RepErrExtHeaderReqd, "extended headers already negotiated")
	default:
		h.refuse(opt, nbdwire.RepErrInvalid, "structured reply already negotiated")
	}
}

// refuseData words what is wrong with the data of an option.
func (h *negotiation) refuseData(opt uint32, err error) {
	name := nbdwire.OptName(opt)
	var long nbdwire.NameLengthError
	switch {
	case errors.As(err, &long):
		h.refuse(opt, nbdwire.RepErrInvalid, "Invalid name length: %d", uint32(long))
	case errors.Is(err, nbdwire.ErrNUL):
		h.refuse(opt, nbdwire.RepErrInvalid, "Unexpected embedded NUL in option %s", name)
	case errors.Is(err, nbdwire.ErrTrailing):
		h.refuse(opt, nbdwire.RepErrInvalid, "option '%s' has unexpected length", name)
	default:
		h.refuse(opt, nbdwire.RepErrInvalid, "Inconsistent lengths in option %s", name)
	}
}

func (h *negotiation) refuseName(opt uint32, name string) {
	if len(name) >= 80 {
		name = name[:80] + "..."
	}
	h.refuse(opt, nbdwire.RepErrUnknown, "export '%s' not present", name)
}

// info handles OptInfo and OptGo; over tells that transmission begins.
func (h *negotiation) info(o nbdwire.Option, data []byte) (over bool) {
	q, err := nbdwire.ParseInfoRequest(data)
	if err != nil {
		h.refuseData(o.Opt, err)
		return false
	}
	exp := h.srv.find(q.Name)
	if exp == nil {
		h.refuseName(o.Opt, q.Name)
		return false
	}
	blockSize := slices.Contains(q.Infos, nbdwire.InfoBlockSize)
	item := func(i nbdwire.Info) { h.out = i.AppendReply(h.out, o.Opt) }
	if slices.Contains(q.Infos, nbdwire.InfoName) {
		item(nbdwire.Info{Type: nbdwire.InfoName, Text: q.Name})
	}
	if exp.spec.HasDescription {
		item(nbdwire.Info{Type: nbdwire.InfoDescription, Text: exp.spec.Description})
	}
	// The smallest block is told only to clients that will heed it.
	lim := exp.spec.Device.Limits()
	align := uint32(max(lim.RequestAlign, 1))
	least := uint32(1)
	if o.Opt == nbdwire.OptInfo || blockSize {
		least = align
	}
	most := uint32(min(cmp.Or(lim.MaxTransfer, nbdwire.MaxPayload), nbdwire.MaxPayload))
	item(nbdwire.Info{Type: nbdwire.InfoBlockSize, Min: least, Preferred: max(4096, least), Max: most})
	item(nbdwire.Info{Type: nbdwire.InfoExport, Size: uint64(exp.spec.Size), Flags: h.exportFlags(o.Opt, exp)})
	if o.Opt == nbdwire.OptInfo {
		if !blockSize && align > 1 {
			h.refuse(o.Opt, nbdwire.RepErrBlockSizeReqd, "request NBD_INFO_BLOCK_SIZE to use this export")
			return false
		}
		h.reply(o.Opt, nbdwire.RepAck)
		return false
	}
	// A client of the export from before the acknowledgement is sent: who has read it counts for a
	// safe removal.
	if !h.join(exp) {
		h.out = h.out[:0]
		h.refuseName(o.Opt, q.Name)
		return false
	}
	h.reply(o.Opt, nbdwire.RepAck)
	return true
}

// join makes the connection a client of exp, unless that is being removed.
func (h *negotiation) join(exp *Export) bool {
	if !exp.attach(h.conn) {
		return false
	}
	h.exp, h.dev = exp, exp.spec.Device
	if h.ctxsOf != exp {
		h.ctxs = nil
	}
	return true
}

// exportFlags are the transmission flags told in answer to opt.
func (h *negotiation) exportFlags(opt uint32, e *Export) uint16 {
	f := e.flags
	if h.form != nbdwire.Simple {
		f |= nbdwire.FlagDF
	}
	if chosen := h.ctxsOf == e && len(h.ctxs) > 0; h.form == nbdwire.Extended && (chosen || opt == nbdwire.OptInfo) {
		f |= nbdwire.FlagStatusPayload
	}
	return f
}

// exportName handles OptExportName, whose only answer to an error is to hang up.
func (h *negotiation) exportName(o nbdwire.Option) error {
	if o.Len > nbdwire.MaxString {
		return errors.New("Bad length received")
	}
	if h.form == nbdwire.Extended {
		return errors.New("Extended headers already negotiated")
	}
	name := make([]byte, o.Len)
	if err := h.read(name); err != nil {
		return err
	}
	exp := h.srv.find(string(name))
	if exp == nil || !h.join(exp) {
		return errors.New("export not found")
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(exp.spec.Size))
	b = binary.BigEndian.AppendUint16(b, h.exportFlags(o.Opt, exp))
	if !h.noZeroes {
		b = append(b, make([]byte, nbdwire.ExportNamePadding)...)
	}
	return h.send(b)
}
