package tlspsk

import "golang.org/x/crypto/cryptobyte"

// Types of messages. Source: RFC 8446, 4.
const (
	typeClientHello         = 1
	typeServerHello         = 2
	typeNewSessionTicket    = 4
	typeEncryptedExtensions = 8
	typeFinished            = 20
	typeKeyUpdate           = 24
	typeMessageHash         = 254
)

// Types of extensions. Source: RFC 8446, 4.2.
const (
	extSupportedGroups   = 10
	extPadding           = 21
	extPreSharedKey      = 41
	extEarlyData         = 42
	extSupportedVersions = 43
	extCookie            = 44
	extPSKModes          = 45
	extKeyShare          = 51
)

const (
	version12 = 0x0303 // what all messages call themselves
	version13 = 0x0304
	// pskDHE is the mode with a Diffie-Hellman exchange. Source: RFC 8446, 4.2.9.
	pskDHE = 1
)

// Sizes, in bytes.
const (
	messageHeader = 4
	// maxMessage is the longest message that is taken, its header included.
	maxMessage = 64 << 10
	// maxCookie is how much a server may have us repeat.
	maxCookie  = 1 << 14
	randomLen  = 32
	maxSession = 32
)

var (
	errSyntax    = fail(DecodeError, "a message of the handshake cannot be read")
	errDuplicate = fail(IllegalParameter, "an extension is there twice")
)

// message makes a message of a type.
func message(typ byte, body func(b *cryptobyte.Builder)) []byte {
	var b cryptobyte.Builder
	b.AddUint8(typ)
	b.AddUint24LengthPrefixed(body)
	return b.BytesOrPanic() // the lengths are ours, or have been checked
}

// prefixed16 adds what body adds, after its length.
func prefixed16(b *cryptobyte.Builder, body func(b *cryptobyte.Builder)) {
	b.AddUint16LengthPrefixed(body)
}

// extension adds an extension.
func extension(b *cryptobyte.Builder, typ uint16, body func(b *cryptobyte.Builder)) {
	b.AddUint16(typ)
	prefixed16(b, body)
}

// extensions calls f with each extension in a list that takes the rest of a message. last tells
// whether no more follow.
func extensions(s *cryptobyte.String, f func(typ uint16, data cryptobyte.String, last bool) error) error {
	var list cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&list) || !s.Empty() {
		return errSyntax
	}
	seen := map[uint16]bool{}
	for !list.Empty() {
		var typ uint16
		var data cryptobyte.String
		if !list.ReadUint16(&typ) || !list.ReadUint16LengthPrefixed(&data) {
			return errSyntax
		}
		if seen[typ] {
			return errDuplicate
		}
		seen[typ] = true
		if err := f(typ, data, list.Empty()); err != nil {
			return err
		}
	}
	return nil
}

// numbers reads a list of 16-bit numbers, at least one, that takes all of s but its length.
func numbers(s *cryptobyte.String) ([]uint16, error) {
	var list cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&list) || list.Empty() {
		return nil, errSyntax
	}
	var l []uint16
	for !list.Empty() {
		var n uint16
		if !list.ReadUint16(&n) {
			return nil, errSyntax
		}
		l = append(l, n)
	}
	return l, nil
}

// checkEncryptedExtensions looks for what a server may not say to what our ClientHello offers.
func checkEncryptedExtensions(body cryptobyte.String) error {
	return extensions(&body, func(typ uint16, _ cryptobyte.String, _ bool) error {
		if typ != extSupportedGroups {
			return fail(UnsupportedExtension, "the server answers what it was not asked")
		}
		return nil
	})
}

func encryptedExtensions() []byte {
	return message(typeEncryptedExtensions, func(b *cryptobyte.Builder) { b.AddUint16(0) })
}

func finishedMessage(proof []byte) []byte {
	return message(typeFinished, func(b *cryptobyte.Builder) { b.AddBytes(proof) })
}
