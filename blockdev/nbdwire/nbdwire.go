// Package nbdwire is the NBD protocol as bytes: constants, and encoding and decoding of the
// handshake, of requests and of replies, for servers and clients. It does no I/O and keeps
// no state; all numbers on the wire are big endian. Source: the NBD project's proto.md.
//
// Encoders append to a slice and allocate nothing themselves. Decoders check what the bytes
// alone can tell (magic, lengths) and never look beyond the slice they are given.
package nbdwire

import "cmp"

// Magic numbers.
const (
	MagicInit       uint64 = 0x4e42444d41474943 // "NBDMAGIC", first bytes of every server
	MagicOption     uint64 = 0x49484156454f5054 // "IHAVEOPT", second bytes, and before each option
	MagicOldStyle   uint64 = 0x0000420281861253 // second bytes of a server without options
	MagicOptReply   uint64 = 0x0003e889045565a9
	MagicRequest    uint32 = 0x25609513
	MagicSimple     uint32 = 0x67446698
	MagicStructured uint32 = 0x668e33ef

	MagicExtRequest uint32 = 0x21e41c71
	MagicExtReply   uint32 = 0x6e8a278c
)

// Limits of a request and of a string (export name, description, context name), in bytes.
const (
	MaxPayload = 32 << 20
	MaxString  = 4096
)

// Sizes of fixed structures, in bytes.
const (
	GreetingSize      = 18
	OptionSize        = 16 // before the option's data
	OptReplySize      = 20 // before the reply's data
	RequestSize       = 28
	ExtRequestSize    = 32 // with extended headers
	SimpleSize        = 16
	ChunkSize         = 20            // header of a structured reply chunk
	DataHeadSize      = ChunkSize + 8 // with the offset of OFFSET_DATA
	ExtChunkSize      = 32            // the same with extended headers
	ExtentSize        = 8             // one BLOCK_STATUS extent
	Extent64Size      = 16            // one BLOCK_STATUS_EXT extent
	ExportNameReply   = 8 + 2         // reply to OPT_EXPORT_NAME
	ExportNamePadding = 124           // and the zeroes after it, unless NO_ZEROES
	OldStyleSize      = 8 + 4 + 124   // what follows MagicOldStyle
	maxErrorMessage   = MaxString     // bytes of text in an error chunk
)

// Handshake flags of the server, and of the client.
const (
	FixedNewstyle uint16 = 1 << 0
	NoZeroes      uint16 = 1 << 1
)

// Transmission flags.
const (
	FlagHasFlags    uint16 = 1 << 0
	FlagReadOnly    uint16 = 1 << 1
	FlagFlush       uint16 = 1 << 2
	FlagFUA         uint16 = 1 << 3
	FlagRotational  uint16 = 1 << 4
	FlagTrim        uint16 = 1 << 5
	FlagWriteZeroes uint16 = 1 << 6
	FlagDF          uint16 = 1 << 7
	FlagMultiConn   uint16 = 1 << 8
	FlagResize      uint16 = 1 << 9
	FlagCache       uint16 = 1 << 10
	FlagFastZero    uint16 = 1 << 11
	// FlagStatusPayload: CmdBlockStatus takes CmdFlagPayload, to choose among the contexts.
	FlagStatusPayload uint16 = 1 << 12
)

// Options of the handshake.
const (
	OptExportName      uint32 = 1
	OptAbort           uint32 = 2
	OptList            uint32 = 3
	OptStartTLS        uint32 = 5
	OptInfo            uint32 = 6
	OptGo              uint32 = 7
	OptStructuredReply uint32 = 8
	OptListMetaContext uint32 = 9
	OptSetMetaContext  uint32 = 10
	OptExtendedHeaders uint32 = 11
)

// Replies to options; those with ErrBit set are errors and carry text.
const (
	RepAck         uint32 = 1
	RepServer      uint32 = 2
	RepInfo        uint32 = 3
	RepMetaContext uint32 = 4

	ErrBit              uint32 = 1 << 31
	RepErrUnsup         uint32 = ErrBit | 1
	RepErrPolicy        uint32 = ErrBit | 2
	RepErrInvalid       uint32 = ErrBit | 3
	RepErrPlatform      uint32 = ErrBit | 4
	RepErrTLSReqd       uint32 = ErrBit | 5
	RepErrUnknown       uint32 = ErrBit | 6
	RepErrShutdown      uint32 = ErrBit | 7
	RepErrBlockSizeReqd uint32 = ErrBit | 8
	RepErrTooBig        uint32 = ErrBit | 9
	RepErrExtHeaderReqd uint32 = ErrBit | 10
)

// Information items of OptInfo and OptGo.
const (
	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Commands.
const (
	CmdRead        uint16 = 0
	CmdWrite       uint16 = 1
	CmdDisc        uint16 = 2
	CmdFlush       uint16 = 3
	CmdTrim        uint16 = 4
	CmdCache       uint16 = 5
	CmdWriteZeroes uint16 = 6
	CmdBlockStatus uint16 = 7
)

// Command flags.
const (
	CmdFlagFUA      uint16 = 1 << 0
	CmdFlagNoHole   uint16 = 1 << 1
	CmdFlagDF       uint16 = 1 << 2
	CmdFlagReqOne   uint16 = 1 << 3
	CmdFlagFastZero uint16 = 1 << 4
	// CmdFlagPayload: the length is that of the payload that follows the request. With extended
	// headers each write has it; without there is no such flag.
	CmdFlagPayload uint16 = 1 << 5
)

// Structured reply chunks. Types with ChunkErrBit set are errors.
const (
	ChunkDone uint16 = 1 << 0 // flag: last chunk of the reply

	ChunkNone           uint16 = 0
	ChunkOffsetData     uint16 = 1
	ChunkOffsetHole     uint16 = 2
	ChunkBlockStatus    uint16 = 5
	ChunkBlockStatusExt uint16 = 6
	ChunkErrBit         uint16 = 1 << 15
	ChunkError          uint16 = ChunkErrBit | 1
	ChunkErrorOffset    uint16 = ChunkErrBit | 2
)

// Metadata contexts and the flags of their extents. The extents of ContextDepth are
// depths instead: 0 in no layer, 1 in the active one, 2 in a backing one.
const (
	ContextAllocation = "base:allocation"
	ContextDepth      = "qemu:allocation-depth"
	// ContextBitmap is what the names of the contexts of dirty bitmaps begin with; the name of the
	// bitmap follows.
	ContextBitmap = "qemu:dirty-bitmap:"

	StateHole uint64 = 1 << 0
	// StateDirty is the flag of extents of ContextBitmap.
	StateDirty uint64 = 1 << 0
	StateZero  uint64 = 1 << 1
)

var optNames = map[uint32]string{
	OptExportName: "export name", OptAbort: "abort", OptList: "list", OptStartTLS: "starttls", OptInfo: "info", OptGo: "go",
	OptStructuredReply: "structured reply", OptListMetaContext: "list meta context", OptSetMetaContext: "set meta context",
	OptExtendedHeaders: "extended headers",
}

// OptName is the name of an option in error texts.
func OptName(opt uint32) string { return cmp.Or(optNames[opt], "<unknown>") }

var repNames = map[uint32]string{
	RepAck: "ack", RepServer: "server", RepInfo: "info", RepMetaContext: "meta context",
	RepErrUnsup: "unsupported", RepErrPolicy: "denied by policy", RepErrInvalid: "invalid",
	RepErrPlatform: "platform lacks support", RepErrTLSReqd: "TLS required", RepErrUnknown: "export unknown",
	RepErrShutdown: "server shutting down", RepErrBlockSizeReqd: "block size required",
	RepErrExtHeaderReqd: "extended headers required",
}

// RepName is the name of a reply to an option in error texts.
func RepName(rep uint32) string { return cmp.Or(repNames[rep], "<unknown>") }

var cmdNames = map[uint16]string{
	CmdRead: "read", CmdWrite: "write", CmdDisc: "disconnect", CmdFlush: "flush", CmdTrim: "trim", CmdCache: "cache",
	CmdWriteZeroes: "write zeroes", CmdBlockStatus: "block status",
}

// CmdName is the name of a command in error texts.
func CmdName(cmd uint16) string { return cmp.Or(cmdNames[cmd], "<unknown>") }
