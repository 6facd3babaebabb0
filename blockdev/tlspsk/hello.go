package tlspsk

import (
	"bytes"

	"golang.org/x/crypto/cryptobyte"
)

// share is the public half of a key for a Diffie-Hellman exchange.
type share struct {
	group uint16
	key   []byte
}

// identity names a key; binder proves that who names it has it.
type identity struct{ name, binder []byte }

// clientHello is what matters of a ClientHello. Source: RFC 8446, 4.1.2.
type clientHello struct {
	random     []byte
	session    []byte
	suites     []uint16
	versions   []uint16
	groups     []uint16
	shares     []share
	modes      []byte
	cookie     []byte
	identities []identity
	early      bool

	hasShares, hasModes bool
	// same is all that a second ClientHello must repeat.
	same []byte
	// unbound is how much of the message binders vouch for, in bytes.
	unbound int
}

// marshal makes the message. Binders are as long as they will be.
func (h *clientHello) marshal() []byte {
	return message(typeClientHello, func(b *cryptobyte.Builder) {
		b.AddUint16(version12)
		b.AddBytes(h.random)
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(h.session) })
		prefixed16(b, func(b *cryptobyte.Builder) { addNumbers(b, h.suites) })
		b.AddBytes([]byte{1, 0}) // no compression
		prefixed16(b, h.addExtensions)
	})
}

func addNumbers(b *cryptobyte.Builder, l []uint16) {
	for _, n := range l {
		b.AddUint16(n)
	}
}

func (h *clientHello) addExtensions(b *cryptobyte.Builder) {
	extension(b, extSupportedVersions, func(b *cryptobyte.Builder) {
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { addNumbers(b, h.versions) })
	})
	extension(b, extSupportedGroups, func(b *cryptobyte.Builder) {
		prefixed16(b, func(b *cryptobyte.Builder) { addNumbers(b, h.groups) })
	})
	extension(b, extKeyShare, func(b *cryptobyte.Builder) {
		prefixed16(b, func(b *cryptobyte.Builder) {
			for _, s := range h.shares {
				addShare(b, s)
			}
		})
	})
	extension(b, extPSKModes, func(b *cryptobyte.Builder) {
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(h.modes) })
	})
	if h.cookie != nil {
		extension(b, extCookie, func(b *cryptobyte.Builder) {
			prefixed16(b, func(b *cryptobyte.Builder) { b.AddBytes(h.cookie) })
		})
	}
	extension(b, extPreSharedKey, func(b *cryptobyte.Builder) { // the last, always
		prefixed16(b, func(b *cryptobyte.Builder) {
			for _, i := range h.identities {
				prefixed16(b, func(b *cryptobyte.Builder) { b.AddBytes(i.name) })
				b.AddUint32(0) // its age, of tickets only
			}
		})
		prefixed16(b, func(b *cryptobyte.Builder) {
			for _, i := range h.identities {
				b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(i.binder) })
			}
		})
	})
}

func addShare(b *cryptobyte.Builder, s share) {
	b.AddUint16(s.group)
	prefixed16(b, func(b *cryptobyte.Builder) { b.AddBytes(s.key) })
}

// parseClientHello reads a message, its header included.
func parseClientHello(raw []byte) (*clientHello, error) {
	h := &clientHello{}
	s := cryptobyte.String(raw[messageHeader:])
	var version uint16
	var session, compression cryptobyte.String
	if !s.ReadUint16(&version) || !s.ReadBytes(&h.random, randomLen) || !s.ReadUint8LengthPrefixed(&session) ||
		len(session) > maxSession {
		return nil, errSyntax
	}
	var err error
	if h.suites, err = numbers(&s); err != nil {
		return nil, err
	}
	if !s.ReadUint8LengthPrefixed(&compression) {
		return nil, errSyntax
	}
	h.session = session
	h.same = bytes.Clone(raw[messageHeader : len(raw)-len(s)])
	if s.Empty() {
		return h, nil // long ago there were no extensions
	}
	err = extensions(&s, func(typ uint16, data cryptobyte.String, last bool) error {
		switch typ {
		case extKeyShare, extPreSharedKey, extEarlyData, extCookie, extPadding: // these may differ
		default:
			h.same = append(h.same, byte(typ>>8), byte(typ), byte(len(data)>>8), byte(len(data)))
			h.same = append(h.same, data...)
		}
		if typ == extPreSharedKey && !last {
			return fail(IllegalParameter, "something follows the list of keys")
		}
		return h.extension(typ, data, len(raw))
	})
	if err == nil && !bytes.Equal(compression, []byte{0}) && h.offers13() {
		err = fail(IllegalParameter, "the client wants compression")
	}
	return h, err
}

func (h *clientHello) offers13() bool {
	for _, v := range h.versions {
		if v == version13 {
			return true
		}
	}
	return false
}

// extension reads one; others than these are not for us. total is the length of the message.
func (h *clientHello) extension(typ uint16, data cryptobyte.String, total int) (err error) {
	var list cryptobyte.String
	switch typ {
	case extSupportedVersions:
		if !data.ReadUint8LengthPrefixed(&list) || list.Empty() || len(list)%2 != 0 {
			return errSyntax
		}
		for !list.Empty() {
			var v uint16
			list.ReadUint16(&v)
			h.versions = append(h.versions, v)
		}
	case extSupportedGroups:
		if h.groups, err = numbers(&data); err != nil {
			return err
		}
	case extPSKModes:
		if !data.ReadUint8LengthPrefixed(&list) || list.Empty() {
			return errSyntax
		}
		h.modes, h.hasModes = list, true
	case extKeyShare:
		if h.shares, err = readShares(&data); err != nil {
			return err
		}
		h.hasShares = true
	case extEarlyData:
		h.early = true
	case extPreSharedKey:
		return h.readIdentities(data, total)
	default:
		return nil
	}
	if !data.Empty() {
		return errSyntax
	}
	return nil
}

func readShares(data *cryptobyte.String) (l []share, err error) {
	var list cryptobyte.String
	if !data.ReadUint16LengthPrefixed(&list) {
		return nil, errSyntax
	}
	seen := map[uint16]bool{}
	for !list.Empty() {
		s, err := readShare(&list)
		if err != nil {
			return nil, err
		}
		if seen[s.group] {
			return nil, fail(IllegalParameter, "a group has two shares")
		}
		seen[s.group] = true
		l = append(l, s)
	}
	return l, nil
}

func readShare(s *cryptobyte.String) (sh share, err error) {
	var key cryptobyte.String
	if !s.ReadUint16(&sh.group) || !s.ReadUint16LengthPrefixed(&key) || key.Empty() {
		return share{}, errSyntax
	}
	sh.key = key
	return sh, nil
}

// readIdentities reads the names of keys and the proofs that the client has them. Source: RFC 8446,
// 4.2.11.
func (h *clientHello) readIdentities(data cryptobyte.String, total int) error {
	var names, binders cryptobyte.String
	if !data.ReadUint16LengthPrefixed(&names) || names.Empty() {
		return errSyntax
	}
	h.unbound = total - len(data)
	if !data.ReadUint16LengthPrefixed(&binders) || binders.Empty() || !data.Empty() {
		return errSyntax
	}
	for !names.Empty() {
		var name cryptobyte.String
		var age uint32
		if !names.ReadUint16LengthPrefixed(&name) || name.Empty() || !names.ReadUint32(&age) {
			return errSyntax
		}
		h.identities = append(h.identities, identity{name: name})
	}
	for i := range h.identities {
		var b cryptobyte.String
		if binders.Empty() {
			return fail(IllegalParameter, "a key has no binder")
		}
		if !binders.ReadUint8LengthPrefixed(&b) || len(b) < 32 {
			return errSyntax
		}
		h.identities[i].binder = b
	}
	if !binders.Empty() {
		return fail(IllegalParameter, "a binder has no key")
	}
	return nil
}

// retryRandom is the random of a ServerHello that asks for another ClientHello. Source: RFC 8446,
// 4.1.3.
var retryRandom = []byte{
	0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
	0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
}

// serverHello is a ServerHello, or a HelloRetryRequest, whose share is a group alone.
type serverHello struct {
	random   []byte
	session  []byte
	suite    uint16
	version  uint16 // 0: the server does not know of versions above 1.2
	share    share
	cookie   []byte
	hasKey   bool
	identity uint16 // the key that the server takes, by its place in the list
	unasked  bool   // it has extensions that no ClientHello of ours asks for
}

func (h *serverHello) retry() bool { return bytes.Equal(h.random, retryRandom) }

func (h *serverHello) marshal() []byte {
	return message(typeServerHello, func(b *cryptobyte.Builder) {
		b.AddUint16(version12)
		b.AddBytes(h.random)
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(h.session) })
		b.AddUint16(h.suite)
		b.AddUint8(0) // no compression
		prefixed16(b, func(b *cryptobyte.Builder) {
			extension(b, extSupportedVersions, func(b *cryptobyte.Builder) { b.AddUint16(h.version) })
			extension(b, extKeyShare, func(b *cryptobyte.Builder) {
				if h.retry() {
					b.AddUint16(h.share.group)
				} else {
					addShare(b, h.share)
				}
			})
			if h.hasKey {
				extension(b, extPreSharedKey, func(b *cryptobyte.Builder) { b.AddUint16(h.identity) })
			}
		})
	})
}

// parseServerHello reads a message, its header included.
func parseServerHello(raw []byte) (*serverHello, error) {
	h := &serverHello{}
	s := cryptobyte.String(raw[messageHeader:])
	var version uint16
	var compression uint8
	var session cryptobyte.String
	if !s.ReadUint16(&version) || !s.ReadBytes(&h.random, randomLen) || !s.ReadUint8LengthPrefixed(&session) ||
		len(session) > maxSession || !s.ReadUint16(&h.suite) || !s.ReadUint8(&compression) {
		return nil, errSyntax
	}
	h.session = session
	if s.Empty() {
		return h, nil
	}
	if err := extensions(&s, h.extension); err != nil {
		return nil, err
	}
	if h.version == version13 && (compression != 0 || version != version12) {
		return nil, fail(IllegalParameter, "the server wants compression, or another version")
	}
	return h, nil
}

func (h *serverHello) extension(typ uint16, data cryptobyte.String, _ bool) (err error) {
	ok := true
	switch {
	case typ == extSupportedVersions:
		ok = data.ReadUint16(&h.version)
	case typ == extKeyShare && h.retry():
		ok = data.ReadUint16(&h.share.group) && h.share.group != 0 // which would say that there is none
	case typ == extKeyShare:
		if h.share, err = readShare(&data); err != nil {
			return err
		}
	case typ == extPreSharedKey && !h.retry():
		ok = data.ReadUint16(&h.identity)
		h.hasKey = true
	case typ == extCookie && h.retry():
		var c cryptobyte.String
		ok = data.ReadUint16LengthPrefixed(&c) && !c.Empty()
		h.cookie = c
	default:
		// A server of old says what it likes: that it is old counts more.
		h.unasked = true
		return nil
	}
	if !ok || !data.Empty() {
		return errSyntax
	}
	return nil
}
