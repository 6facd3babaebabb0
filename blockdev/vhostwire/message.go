package vhostwire

import (
	"encoding/binary"
	"fmt"
)

// Message is a message's payload, of which the fields count that belong to the request.
type Message struct {
	Request Request
	// Number is the payload of those that have one number.
	Number uint64
	// State is the payload of SetVringNum, -Base, -Enable and GetVringBase.
	State State
	// Addr is the payload of SetVringAddr.
	Addr Addr
	// Regions are the payload of SetMemTable, and the one of AddMemReg and RemMemReg. Parse uses
	// the memory that is there.
	Regions []Region
	// Config is the payload of GetConfig and SetConfig.
	Config Config
	// Log is the payload of SetLogBase.
	Log Log
	// Inflight is the payload of GetInflightFD and SetInflightFD.
	Inflight Inflight
}

// State is a number about a ring.
type State struct{ Index, Num uint32 }

// Addr is where a ring is, in addresses of the front end.
type Addr struct {
	Index uint32
	// Flags: RingLog.
	Flags             uint32
	Desc, Used, Avail uint64
	// Log is the guest address of the used ring, for the log.
	Log uint64
}

// Region is a piece of guest memory.
type Region struct {
	Guest uint64 // physical address, in the guest
	Size  uint64 // in bytes
	User  uint64 // address in the front end
	// Offset is where the region begins in the descriptor that comes with it, in bytes.
	Offset uint64
}

// Config is a part of the configuration space.
type Config struct {
	Offset uint32
	Flags  uint32 // 0: the guest writes; 1: for migration
	Data   []byte // of the message that was parsed
}

// Log is where in a descriptor the log is, in bytes.
type Log struct{ Size, Offset uint64 }

// Inflight describes the area for requests that are in flight; its place in bytes.
type Inflight struct {
	Size, Offset      uint64
	Queues, QueueSize uint16
	// Padded: front ends in C have four bytes behind it, and want them in the reply.
	Padded bool
}

// Sizes of payloads, in bytes.
const (
	stateSize    = 8
	addrSize     = 40
	regionSize   = 32
	memHead      = 8 // in front of the regions of a table, and of the one of a single region
	configHead   = 12
	logSize      = 16
	inflightSize = 20
	inflightPad  = 4
)

func u32(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

// Parse takes a message apart that came with so many descriptors; b is its payload, of h.Size
// bytes. Errors: an unknown request, a payload that is not its, descriptors that do not belong to
// it.
func (m *Message) Parse(h Header, b []byte, fds int) error {
	if !h.Request.known() {
		return fmt.Errorf("unknown message %d", h.Request)
	}
	m.Request = h.Request
	if fds > requests[h.Request].fds {
		return fmt.Errorf("message %d has %d file descriptors", h.Request, fds)
	}
	if !m.payload(requests[h.Request].layout, b) {
		return fmt.Errorf("message %d has %d bytes", h.Request, len(b))
	}
	if want := m.wanted(); fds < want || fds > want && h.Request == SetMemTable {
		return fmt.Errorf("message %d has %d file descriptors instead of %d", h.Request, fds, want)
	}
	return nil
}

// wanted is how many descriptors must come with m.
func (m *Message) wanted() int {
	switch m.Request {
	case SetMemTable:
		return len(m.Regions)
	case RemMemReg:
		return 0
	case SetVringKick, SetVringCall, SetVringErr:
		if m.Number&RingNoFD != 0 {
			return 0
		}
	}
	return requests[m.Request].fds
}

// payload takes b apart; it is false if b has another size than such a layout.
func (m *Message) payload(l layout, b []byte) bool {
	n := len(b)
	switch l {
	case number:
		if n != 8 {
			return false
		}
		m.Number = u64(b)
	case state:
		if n != stateSize {
			return false
		}
		m.State = State{u32(b), u32(b[4:])}
	case addr:
		if n != addrSize {
			return false
		}
		m.Addr = Addr{u32(b), u32(b[4:]), u64(b[8:]), u64(b[16:]), u64(b[24:]), u64(b[32:])}
	case memTable:
		return n >= memHead && u32(b) <= MaxRegions && m.regions(b[memHead:], int(u32(b)))
	case memRegion:
		return n >= memHead && m.regions(b[memHead:], 1)
	case config:
		if n < configHead || n > configHead+MaxConfig || int(u32(b[4:])) != n-configHead {
			return false
		}
		m.Config = Config{Offset: u32(b), Flags: u32(b[8:]), Data: b[configHead:]}
	case logArea:
		if n != logSize {
			return false
		}
		m.Log = Log{u64(b), u64(b[8:])}
	case inflight:
		return m.inflight(b)
	default:
		return n == 0
	}
	return true
}

// inflight takes the description of an area apart.
func (m *Message) inflight(b []byte) bool {
	if n := len(b); n != inflightSize && n != inflightSize+inflightPad {
		return false
	}
	m.Inflight = Inflight{u64(b), u64(b[8:]), binary.NativeEndian.Uint16(b[16:]), binary.NativeEndian.Uint16(b[18:]),
		len(b) > inflightSize}
	return true
}

func (m *Message) regions(b []byte, count int) bool {
	m.Regions = m.Regions[:0]
	if len(b) != count*regionSize {
		return false
	}
	for ; len(b) > 0; b = b[regionSize:] {
		m.Regions = append(m.Regions, Region{u64(b), u64(b[8:]), u64(b[16:]), u64(b[24:])})
	}
	return true
}

// Append appends m as a front end sends it, flags being FlagNeedReply or 0.
func (m *Message) Append(b []byte, flags uint32) []byte {
	at := len(b)
	b = AppendHeader(b, m.Request, flags, 0)
	le := binary.NativeEndian
	switch requests[m.Request].layout {
	case number:
		b = le.AppendUint64(b, m.Number)
	case state:
		b = le.AppendUint32(le.AppendUint32(b, m.State.Index), m.State.Num)
	case addr:
		b = le.AppendUint32(le.AppendUint32(b, m.Addr.Index), m.Addr.Flags)
		for _, x := range [...]uint64{m.Addr.Desc, m.Addr.Used, m.Addr.Avail, m.Addr.Log} {
			b = le.AppendUint64(b, x)
		}
	case memTable:
		b = appendRegions(le.AppendUint64(b, uint64(len(m.Regions))), m.Regions)
	case memRegion:
		b = appendRegions(le.AppendUint64(b, 0), m.Regions[:1])
	case config:
		b = appendConfig(b, &m.Config)
	case logArea:
		b = le.AppendUint64(le.AppendUint64(b, m.Log.Size), m.Log.Offset)
	case inflight:
		b = appendInflight(b, &m.Inflight)
	}
	le.PutUint32(b[at+8:], uint32(len(b)-at-HeaderSize))
	return b
}

func appendRegions(b []byte, rs []Region) []byte {
	for _, r := range rs {
		for _, x := range [...]uint64{r.Guest, r.Size, r.User, r.Offset} {
			b = binary.NativeEndian.AppendUint64(b, x)
		}
	}
	return b
}

func appendConfig(b []byte, c *Config) []byte {
	for _, x := range [...]uint32{c.Offset, uint32(len(c.Data)), c.Flags} {
		b = binary.NativeEndian.AppendUint32(b, x)
	}
	return append(b, c.Data...)
}

func appendInflight(b []byte, i *Inflight) []byte {
	le := binary.NativeEndian
	b = le.AppendUint64(le.AppendUint64(b, i.Size), i.Offset)
	b = le.AppendUint16(le.AppendUint16(b, i.Queues), i.QueueSize)
	if i.Padded {
		b = append(b, make([]byte, inflightPad)...)
	}
	return b
}

// AppendHeader appends the header of a message with that many bytes of payload.
func AppendHeader(b []byte, r Request, flags uint32, size int) []byte {
	le := binary.NativeEndian
	return le.AppendUint32(le.AppendUint32(le.AppendUint32(b, uint32(r)), flags&^versionMask|Version), uint32(size))
}

// AppendNumber appends the reply to r that is a number.
func AppendNumber(b []byte, r Request, n uint64) []byte {
	return binary.NativeEndian.AppendUint64(AppendHeader(b, r, FlagReply, 8), n)
}

// AppendState appends the reply to GetVringBase.
func AppendState(b []byte, r Request, s State) []byte {
	b = AppendHeader(b, r, FlagReply, stateSize)
	return binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(b, s.Index), s.Num)
}

// AppendConfig appends the reply to GetConfig; nil: an error.
func AppendConfig(b []byte, c *Config) []byte {
	if c == nil {
		return AppendHeader(b, GetConfig, FlagReply, 0)
	}
	return appendConfig(AppendHeader(b, GetConfig, FlagReply, configHead+len(c.Data)), c)
}

// AppendInflight appends the reply to GetInflightFD.
func AppendInflight(b []byte, i *Inflight) []byte {
	n := inflightSize
	if i.Padded {
		n += inflightPad
	}
	return appendInflight(AppendHeader(b, GetInflightFD, FlagReply, n), i)
}
