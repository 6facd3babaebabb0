package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"syscall"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/graph/blk"
)

// maxMinBlock is the largest minimum block size that the protocol allows. What is smaller is read
// and written back by us, so a server must not decide on it freely.
const maxMinBlock = 64 << 10

// export is what the handshake has told.
type export struct {
	size  int64  // bytes
	flags uint16 // transmission flags
	// Block sizes, 0 if the server does not say.
	minBlock, optBlock, maxBlock uint32
	structured                   bool
	extended                     bool // headers, which implies structured replies
	status                       bool // block status of the context asked for, which has the id context
	context                      uint32
}

func (e *export) has(flag uint16) bool { return e.flags&flag != 0 }

// hello is a handshake.
type hello struct {
	nc      net.Conn
	tls     *tlscreds.Client // nil: in the clear
	name    string           // of the export
	context string           // of the block status
	zeroes  bool             // the server pads its answer to OptExportName
	e       export
	buf     [2 + 12 + nbdwire.OptReplySize]byte
}

// handshake asks the server for an export, and returns the connection to go on with. How long it
// may take is the connection's deadline.
func handshake(nc net.Conn, s *server) (net.Conn, *export, error) {
	h := &hello{nc: nc, tls: s.tls, name: s.export, context: s.context}
	if err := h.run(); err != nil {
		return nil, nil, err
	}
	if h.e.size < 0 || h.e.size > blk.MaxSize {
		return nil, nil, blk.Text("Could not refresh total sector count: File too large", syscall.EFBIG)
	}
	return h.nc, &h.e, nil
}

// run greets and negotiates.
func (h *hello) run() error {
	b, err := h.read(8, "initial magic")
	if err != nil {
		return err
	}
	if magic := be64(b); magic != nbdwire.MagicInit {
		return invalid("Bad initial magic received: 0x%x", magic)
	}
	if b, err = h.read(8, "server magic"); err != nil {
		return err
	}
	switch magic := be64(b); magic {
	case nbdwire.MagicOption:
		return h.newStyle()
	case nbdwire.MagicOldStyle:
		return h.oldStyle()
	default:
		return invalid("Bad server magic received: 0x%x", magic)
	}
}

// oldStyle takes the one export of a server without options.
func (h *hello) oldStyle() error {
	if h.tls != nil {
		return errNoTLS
	}
	if h.name != "" {
		return invalid("Server does not support non-empty export names")
	}
	var b [nbdwire.OldStyleSize]byte
	if err := h.readFull(b[:], "export length"); err != nil {
		return err
	}
	size, flags, _ := nbdwire.ParseOldStyle(b[:])
	if flags > 0xffff {
		return invalid("Unexpected export flags 0x%x", flags)
	}
	h.e.size, h.e.flags = int64(size), uint16(flags)
	return nil
}

// newStyle chooses the export by options.
func (h *hello) newStyle() error {
	b, err := h.read(2, "server flags")
	if err != nil {
		return err
	}
	given := uint16(b[0])<<8 | uint16(b[1])
	h.zeroes = given&nbdwire.NoZeroes == 0
	reply := given & (nbdwire.FixedNewstyle | nbdwire.NoZeroes)
	if _, err := h.nc.Write([]byte{0, 0, byte(reply >> 8), byte(reply)}); err != nil {
		return sending("clientflags field", err)
	}
	fixed := given&nbdwire.FixedNewstyle != 0
	if h.tls != nil {
		if !fixed {
			return errNoTLS
		}
		if err := h.startTLS(); err != nil {
			return err
		}
	}
	if !fixed {
		return h.exportName()
	}
	if h.e.extended, err = h.simpleOption(nbdwire.OptExtendedHeaders, false); err != nil {
		return err
	}
	h.e.structured = h.e.extended
	if !h.e.structured {
		if h.e.structured, err = h.simpleOption(nbdwire.OptStructuredReply, false); err != nil {
			return err
		}
	}
	if h.e.structured {
		if err := h.metaContext(); err != nil {
			return err
		}
	}
	if done, err := h.goOption(); done || err != nil {
		return err
	}
	return h.exportName()
}

var errNoTLS = invalid("Server does not support STARTTLS")

// startTLS goes on under TLS.
func (h *hello) startTLS() error {
	ok, err := h.simpleOption(nbdwire.OptStartTLS, true)
	switch {
	case err != nil:
		return err
	case !ok:
		return invalid("Server don't support STARTTLS option")
	}
	nc, err := h.tls.Connect(h.nc)
	if err != nil {
		told := blk.Text(err.Error(), syscall.EINVAL)
		if alert := tlscreds.Alert(err); alert != "" {
			told = blk.WithHint(told, "The server's reason: "+alert+"\n")
		}
		return told
	}
	h.nc = nc
	return nil
}

// simpleOption sends an option without data and tells whether the server agrees. It may refuse for
// whatever reason, unless strict.
func (h *hello) simpleOption(opt uint32, strict bool) (bool, error) {
	if err := h.send(opt, nil); err != nil {
		return false, err
	}
	r, err := h.reply(opt)
	if err != nil {
		return false, err
	}
	if r.Type&nbdwire.ErrBit != 0 {
		return false, h.refusal(r, strict)
	}
	if r.Type != nbdwire.RepAck {
		return false, invalid("Server answered option %d (%s) with unexpected reply %d (%s)",
			opt, nbdwire.OptName(opt), r.Type, nbdwire.RepName(r.Type))
	}
	if r.Len != 0 {
		return false, invalid("Option %d ('%s') response length is %d (it should be zero)",
			opt, nbdwire.OptName(opt), r.Len)
	}
	return true, nil
}

// metaContext asks for the context of the block status.
func (h *hello) metaContext() error {
	const opt = nbdwire.OptSetMetaContext
	if err := h.send(opt, nbdwire.AppendMetaQueries(nil, h.name, h.context)); err != nil {
		return err
	}
	for {
		r, err := h.reply(opt)
		if err != nil {
			return err
		}
		switch {
		case r.Type&nbdwire.ErrBit != 0:
			h.e.status = false
			return h.refusal(r, false)
		case r.Type == nbdwire.RepAck && r.Len == 0:
			return nil
		case r.Type == nbdwire.RepAck:
			return invalid("Unexpected length to ACK response")
		case r.Type != nbdwire.RepMetaContext:
			return unexpected("Unexpected", r, nbdwire.RepMetaContext)
		case h.e.status:
			return invalid("Server answered with more than one context")
		case r.Len <= 4 || r.Len > 4+nbdwire.MaxString:
			return invalid("Failed to negotiate meta context, server answered with unexpected length %d", r.Len)
		}
		b := make([]byte, r.Len)
		if err := h.readFull(b, "context id"); err != nil {
			return err
		}
		id, name, err := nbdwire.ParseMetaContext(b)
		if err != nil || name != h.context {
			return invalid("Failed to negotiate meta context '%s', server answered with different context '%s'",
				h.context, name)
		}
		h.e.status, h.e.context = true, id
	}
}

// goOption chooses the export and learns about it; done is false with a server that does not know
// the option.
func (h *hello) goOption() (done bool, err error) {
	const opt = nbdwire.OptGo
	q := nbdwire.InfoRequest{Name: h.name, Infos: []uint16{nbdwire.InfoBlockSize}}
	if err := h.send(opt, q.Append(nil)); err != nil {
		return false, err
	}
	known := false
	for {
		r, err := h.reply(opt)
		if err != nil {
			return false, err
		}
		switch {
		case r.Type&nbdwire.ErrBit != 0:
			return false, h.refusal(r, true)
		case r.Type == nbdwire.RepAck && r.Len > 0:
			return false, invalid("server sent invalid NBD_REP_ACK")
		case r.Type == nbdwire.RepAck && !known:
			return false, invalid("broken server omitted NBD_INFO_EXPORT")
		case r.Type == nbdwire.RepAck:
			return true, nil
		case r.Type != nbdwire.RepInfo:
			return false, unexpected("unexpected", r, nbdwire.RepInfo)
		case r.Len < 2:
			return false, invalid("NBD_REP_INFO length %d is too short", r.Len)
		}
		isExport, err := h.info(r.Len)
		if err != nil {
			return false, err
		}
		known = known || isExport
	}
}

// info takes an item of n bytes in, and tells whether it was the one about the export.
func (h *hello) info(n uint32) (isExport bool, err error) {
	b, err := h.read(2, "info type")
	if err != nil {
		return false, err
	}
	typ := uint16(b[0])<<8 | uint16(b[1])
	want := map[uint16]uint32{nbdwire.InfoExport: 12, nbdwire.InfoBlockSize: 14}[typ]
	if want == 0 {
		return false, h.skip(int64(n)-2, "info payload")
	}
	if n != want {
		return false, invalid("remaining export info len %d is unexpected size", n-2)
	}
	b = h.buf[:n]
	if err := h.readFull(b[2:], "info size"); err != nil { // the type is there still
		return false, err
	}
	i, err := nbdwire.ParseInfo(b)
	if err != nil {
		return false, err
	}
	if typ == nbdwire.InfoExport {
		h.e.size, h.e.flags = int64(i.Size), i.Flags
		if m := uint64(h.e.minBlock); m > 0 && i.Size%m != 0 {
			return false, invalid("export size %d is not multiple of minimum block size %d", i.Size, m)
		}
		return true, nil
	}
	return false, h.blockSize(&i)
}

func (h *hello) blockSize(i *nbdwire.Info) error {
	switch {
	case bits.OnesCount32(i.Min) != 1:
		return invalid("server minimum block size %d is not a power of two", i.Min)
	case i.Min > maxMinBlock:
		return invalid("server minimum block size %d is too large", i.Min)
	case bits.OnesCount32(i.Preferred) != 1 || i.Preferred < i.Min:
		return invalid("server preferred block size %d is not valid", i.Preferred)
	case i.Max < i.Min:
		return invalid("server maximum block size %d is not valid", i.Max)
	}
	h.e.minBlock, h.e.optBlock, h.e.maxBlock = i.Min, i.Preferred, i.Max&^(i.Min-1)
	return nil
}

// exportName chooses the export where OptGo cannot be had; a server that has no such export hangs
// up.
func (h *hello) exportName() error {
	if err := h.send(nbdwire.OptExportName, []byte(h.name)); err != nil {
		return err
	}
	b, err := h.read(nbdwire.ExportNameReply, "export length")
	if err != nil {
		return err
	}
	size, flags, _ := nbdwire.ParseExportNameReply(b)
	h.e.size, h.e.flags = int64(size), flags
	if h.zeroes {
		return h.skip(nbdwire.ExportNamePadding, "reserved block")
	}
	return nil
}

// send sends an option.
func (h *hello) send(opt uint32, data []byte) error {
	if _, err := h.nc.Write(nbdwire.AppendOption(nil, opt, data)); err != nil {
		return sending("option request header", err)
	}
	return nil
}

// reply reads the head of a reply to opt.
func (h *hello) reply(opt uint32) (r nbdwire.OptReply, err error) {
	b, err := h.read(nbdwire.OptReplySize, "option reply")
	if err != nil {
		return r, err
	}
	if r, err = nbdwire.ParseOptReply(b); err != nil {
		return r, invalid("Unexpected option reply magic")
	}
	if r.Opt != opt {
		return r, invalid("Unexpected option type %d (%s), expected %d (%s)",
			r.Opt, nbdwire.OptName(r.Opt), opt, nbdwire.OptName(opt))
	}
	return r, nil
}

// refusal reads the text of an error reply. It is nil where the server need not agree: it does not
// know the option, or, unless strict, refuses it for whatever reason.
func (h *hello) refusal(r nbdwire.OptReply, strict bool) error {
	if r.Len > nbdwire.MaxPayload {
		return invalid("server error %d (%s) message is too long", r.Type, nbdwire.RepName(r.Type))
	}
	text := make([]byte, min(r.Len, nbdwire.MaxString))
	what := fmt.Sprintf("option error %d (%s) message", r.Type, nbdwire.RepName(r.Type))
	if err := h.readFull(text, what); err != nil {
		return err
	}
	if err := h.skip(int64(r.Len)-int64(len(text)), what); err != nil {
		return err
	}
	if r.Type == nbdwire.RepErrUnsup || !strict {
		return nil
	}
	advice := ""
	format := "Unknown error code when asking for option %d (%s)"
	switch r.Type {
	case nbdwire.RepErrPolicy:
		format = "Denied by server for option %d (%s)"
	case nbdwire.RepErrInvalid:
		format = "Invalid parameters for option %d (%s)"
	case nbdwire.RepErrPlatform:
		format = "Server lacks support for option %d (%s)"
	case nbdwire.RepErrTLSReqd:
		format = "TLS negotiation required before option %d (%s)"
		advice = "Did you forget a valid tls-creds?\n"
	case nbdwire.RepErrUnknown:
		return h.reported(invalid("Requested export not available"), text, "")
	case nbdwire.RepErrShutdown:
		format = "Server shutting down before option %d (%s)"
	case nbdwire.RepErrBlockSizeReqd:
		format = "Server requires INFO_BLOCK_SIZE for option %d (%s)"
	}
	return h.reported(invalid(format, r.Opt, nbdwire.OptName(r.Opt)), text, advice)
}

// reported is err with advice, and with the server's own words, if it had any.
func (h *hello) reported(err error, text []byte, advice string) error {
	if len(text) > 0 {
		advice += "server reported: " + string(bytes.ToValidUTF8(text, []byte("?")))
	}
	if advice == "" {
		return err
	}
	return blk.WithHint(err, advice)
}

// read reads n bytes, at most as many as the longest fixed structure has. They hold until the next
// call.
func (h *hello) read(n int, what string) ([]byte, error) {
	b := h.buf[:n]
	return b, h.readFull(b, what)
}

func (h *hello) readFull(b []byte, what string) error {
	_, err := io.ReadFull(h.nc, b)
	return reading(what, err)
}

// skip reads n bytes that do not matter.
func (h *hello) skip(n int64, what string) error {
	_, err := io.CopyN(io.Discard, h.nc, n)
	return reading(what, err)
}

// reading words an error of reading from the server, nil of none.
func reading(what string, err error) error {
	var under *tlscreds.ChannelError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &under):
		return blk.Text("Failed to read "+what+": "+under.Error(), syscall.EIO)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return blk.Text("Failed to read "+what+": Unexpected end-of-file before all data were read", syscall.EIO)
	}
	return blk.Text("Failed to read "+what+": Unable to read from socket: "+ioText(err), syscall.EIO)
}

func sending(what string, err error) error {
	if under := (*tlscreds.ChannelError)(nil); errors.As(err, &under) {
		return blk.Text("Failed to send "+what+": "+under.Error(), syscall.EIO)
	}
	return blk.Text("Failed to send "+what+": Unable to write to socket: "+ioText(err), syscall.EIO)
}

// ioText is the errno of err in words. A server that was too slow has ETIMEDOUT.
func ioText(err error) string {
	if t, ok := err.(net.Error); ok && t.Timeout() {
		err = syscall.ETIMEDOUT
	}
	return blk.ErrnoText(err)
}

// invalid is an error of a server that does not keep to the protocol, or refuses.
func invalid(format string, a ...any) error {
	return blk.Text(fmt.Sprintf(format, a...), syscall.EINVAL)
}

func unexpected(how string, r nbdwire.OptReply, want uint32) error {
	return invalid("%s reply type %d (%s), expected %d (%s)", how,
		r.Type, nbdwire.RepName(r.Type), want, nbdwire.RepName(want))
}

func be64(b []byte) (v uint64) {
	for _, c := range b[:8] {
		v = v<<8 | uint64(c)
	}
	return v
}
