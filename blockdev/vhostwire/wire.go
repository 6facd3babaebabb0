package vhostwire

import "fmt"

// HeaderSize is the size of a message's header, in bytes.
const HeaderSize = 12

// Version is that of the protocol; there is one.
const Version = 1

// Flags of a header. The two lowest bits are the version.
const (
	versionMask = 3
	// FlagReply marks what answers a request.
	FlagReply = 1 << 2
	// FlagNeedReply asks for an answer to a message that has none by itself (ProtoReplyAck).
	FlagNeedReply = 1 << 3
)

// Limits.
const (
	// MaxRegions is how many regions a message SetMemTable can have.
	MaxRegions = 8
	// MaxFDs is how many descriptors a message can have: one for each region.
	MaxFDs = MaxRegions
	// MaxConfig is the size of the largest configuration space, in bytes.
	MaxConfig = 256
	// MaxPayload is the size of the largest payload, in bytes.
	MaxPayload = memHead + MaxRegions*regionSize
)

// Request is what a message is about.
type Request uint32

// Requests of front ends; the numbers left out are not for disks.
const (
	GetFeatures         Request = 1
	SetFeatures         Request = 2
	SetOwner            Request = 3
	ResetOwner          Request = 4
	SetMemTable         Request = 5
	SetLogBase          Request = 6
	SetLogFD            Request = 7
	SetVringNum         Request = 8
	SetVringAddr        Request = 9
	SetVringBase        Request = 10
	GetVringBase        Request = 11
	SetVringKick        Request = 12
	SetVringCall        Request = 13
	SetVringErr         Request = 14
	GetProtocolFeatures Request = 15
	SetProtocolFeatures Request = 16
	GetQueueNum         Request = 17
	SetVringEnable      Request = 18
	SetBackendReqFD     Request = 21
	GetConfig           Request = 24
	SetConfig           Request = 25
	GetInflightFD       Request = 31
	SetInflightFD       Request = 32
	ResetDevice         Request = 34
	GetMaxMemSlots      Request = 36
	AddMemReg           Request = 37
	RemMemReg           Request = 38
	SetStatus           Request = 39
	GetStatus           Request = 40
)

// BackendConfigChange is what a back end tells on its own channel (SetBackendReqFD): the
// configuration space has changed. It has no payload.
const BackendConfigChange Request = 2

// Protocol features, as masks.
const (
	ProtoMQ               uint64 = 1 << 0
	ProtoLogShmFD         uint64 = 1 << 1
	ProtoReplyAck         uint64 = 1 << 3
	ProtoBackendReq       uint64 = 1 << 5
	ProtoConfig           uint64 = 1 << 9
	ProtoInflightShmFD    uint64 = 1 << 12
	ProtoResetDevice      uint64 = 1 << 13
	ProtoConfigureMemSlot uint64 = 1 << 15
	ProtoStatus           uint64 = 1 << 16
)

// Features of the transport among the device's, as masks.
const (
	// FLogAll: all that is written to guest memory is marked in the log.
	FLogAll uint64 = 1 << 26
	// FProtocolFeatures: there are protocol features.
	FProtocolFeatures uint64 = 1 << 30
)

// Parts of the payload of messages about the descriptors of a ring.
const (
	RingIndexMask uint64 = 0xff
	// RingNoFD: no descriptor comes with the message.
	RingNoFD uint64 = 1 << 8
)

// RingLog is the flag of a ring's addresses that asks for a log of what is written to its used
// ring.
const RingLog uint32 = 1

// layout is what a payload consists of.
type layout uint8

const (
	empty layout = iota
	number
	state
	addr
	memTable
	memRegion
	config
	logArea
	inflight
	known // a request, with an empty payload: the zero layout is that of no request
)

// requests are the layouts of the requests there are, and how many descriptors may come with them.
var requests = [...]struct {
	layout layout
	fds    int
}{
	GetFeatures:         {known, 0},
	SetFeatures:         {number, 0},
	SetOwner:            {known, 0},
	ResetOwner:          {known, 0},
	SetMemTable:         {memTable, MaxRegions},
	SetLogBase:          {logArea, 1},
	SetLogFD:            {known, 1},
	SetVringNum:         {state, 0},
	SetVringAddr:        {addr, 0},
	SetVringBase:        {state, 0},
	GetVringBase:        {state, 0},
	SetVringKick:        {number, 1},
	SetVringCall:        {number, 1},
	SetVringErr:         {number, 1},
	GetProtocolFeatures: {known, 0},
	SetProtocolFeatures: {number, 0},
	GetQueueNum:         {known, 0},
	SetVringEnable:      {state, 0},
	SetBackendReqFD:     {known, 1},
	GetConfig:           {config, 0},
	SetConfig:           {config, 0},
	GetInflightFD:       {inflight, 0},
	SetInflightFD:       {inflight, 1},
	ResetDevice:         {known, 0},
	GetMaxMemSlots:      {known, 0},
	AddMemReg:           {memRegion, 1},
	RemMemReg:           {memRegion, 1}, // not needed; some front ends send one
	SetStatus:           {number, 0},
	GetStatus:           {known, 0},
}

// known tells whether there is such a request.
func (r Request) known() bool { return int(r) < len(requests) && requests[r].layout != empty }

// Header is that of a message.
type Header struct {
	Request Request
	Flags   uint32
	Size    uint32 // of the payload, in bytes
}

// ParseHeader takes a header apart. Errors: what no front end sends, with which the connection has
// to end, as where the next message begins is not known.
func ParseHeader(b []byte) (h Header, err error) {
	h = Header{Request(u32(b)), u32(b[4:]), u32(b[8:])}
	switch {
	case h.Flags&versionMask != Version:
		err = fmt.Errorf("message of version %d", h.Flags&versionMask)
	case h.Flags&FlagReply != 0:
		err = fmt.Errorf("a reply to message %d, which was not sent", h.Request)
	case h.Size > MaxPayload:
		err = fmt.Errorf("message %d has %d bytes", h.Request, h.Size)
	}
	return h, err
}

// NeedReply tells whether an answer is asked for, whatever the request.
func (h Header) NeedReply() bool { return h.Flags&FlagNeedReply != 0 }
