package tlspsk

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"slices"
)

// maxLookups is how many of the keys that a client names are looked for.
const maxLookups = 8

// server is the handshake of who answers.
func (s *shake) server() error {
	raw, hello, err := s.clientHello()
	if err != nil {
		return err
	}
	s.c.in.seenHello = true
	id, err := s.pick(hello)
	if err != nil {
		return err
	}
	g, theirs, err := s.pickGroup(hello)
	if err != nil {
		return err
	}
	at, err := s.bound(raw, hello)
	if err != nil {
		return err
	}
	if hello.early {
		s.c.in.early = maxEarly
	}
	s.t.add(raw)
	if theirs == nil {
		if raw, hello, err = s.askAgain(hello, id, g); err != nil {
			return err
		}
		name := s.c.peer
		if at, err = s.bound(raw, hello); err != nil {
			return err
		}
		if s.c.peer != name {
			return fail(IllegalParameter, "the client changes its mind")
		}
		s.t.add(raw)
		theirs = hello.shares[0].key
	}
	s.choose(id, g.id)
	key, err := g.curve.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	return s.answer(hello, at, key, theirs)
}

// clientHello waits for one.
func (s *shake) clientHello() ([]byte, *clientHello, error) {
	raw, err := s.message(typeClientHello)
	if err != nil {
		return nil, nil, err
	}
	h, err := parseClientHello(raw)
	switch {
	case err != nil:
		return nil, nil, err
	case !h.offers13():
		return nil, nil, fail(ProtocolVersion, "the client does not speak TLS 1.3")
	case len(h.identities) == 0:
		return nil, nil, fail(HandshakeFailure, "the client has no key")
	case !h.hasModes, h.groups == nil, !h.hasShares:
		return nil, nil, fail(MissingExtension, "the client does not say what it can do with its key")
	case !bytes.Contains(h.modes, []byte{pskDHE}):
		return nil, nil, fail(HandshakeFailure, "the client does not exchange keys")
	case len(s.c.in.hand) > 0:
		return nil, nil, fail(UnexpectedMessage, "the client does not wait for the server")
	}
	return raw, h, nil
}

// pick is the suite that both ends have.
func (s *shake) pick(h *clientHello) (uint16, error) {
	for _, x := range s.c.suites {
		if x.hash == s.t.hash && slices.Contains(h.suites, x.id) {
			return x.id, nil
		}
	}
	return 0, fail(HandshakeFailure, "the client has no cipher in common with us")
}

// pickGroup is a group that both ends have, and the client's share of it; nil if there is none.
func (s *shake) pickGroup(h *clientHello) (group, []byte, error) {
	for _, sh := range h.shares {
		if !slices.Contains(h.groups, sh.group) {
			return group{}, nil, fail(IllegalParameter, "the client has a share of a group that it does not offer")
		}
	}
	for _, g := range s.c.groups {
		for _, sh := range h.shares {
			if sh.group == g.id {
				return g, sh.key, nil
			}
		}
	}
	for _, g := range s.c.groups {
		if slices.Contains(h.groups, g.id) {
			return g, nil, nil
		}
	}
	return group{}, nil, fail(HandshakeFailure, "the client has no group in common with us")
}

// bound picks the first key that we have too, and checks that the client has it. Whether there was
// none or the client does not have it, takes the same work and comes to the same: names of keys
// cannot be guessed by who has none.
func (s *shake) bound(raw []byte, h *clientHello) (at int, err error) {
	var key []byte
	found := false
	for i, id := range h.identities[:min(len(h.identities), maxLookups)] {
		if key, found = s.c.config.Lookup(string(id.name)); found && len(key) > 0 {
			at = i
			break
		}
		found = false
	}
	if !found {
		key = random(s.t.hash.Size())
	}
	s.keys.wipe()
	s.keys = newSchedule(s.t.hash, key)
	clear(key)
	want := s.keys.binder(labelBinder, s.t.sum(raw[:h.unbound]))
	if !hmac.Equal(h.identities[at].binder, want) || !found {
		return 0, fail(DecryptError, "the client does not have the key")
	}
	s.c.peer = string(h.identities[at].name)
	return at, nil
}

// askAgain asks for a ClientHello with a share of a group.
func (s *shake) askAgain(first *clientHello, id uint16, g group) ([]byte, *clientHello, error) {
	s.t.retry()
	s.send((&serverHello{
		random: retryRandom, session: first.session, suite: id, version: version13, share: share{group: g.id},
	}).marshal())
	s.changeCipherSpec()
	if err := s.flush(); err != nil {
		return nil, nil, err
	}
	raw, h, err := s.clientHello()
	switch {
	case err != nil:
		return nil, nil, err
	case !bytes.Equal(h.same, first.same), h.early, len(h.shares) != 1, h.shares[0].group != g.id:
		return nil, nil, fail(IllegalParameter, "the client does not send what it was asked for")
	}
	s.c.in.early = 0
	return raw, h, nil
}

// answer is the rest.
func (s *shake) answer(hello *clientHello, at int, key *ecdh.PrivateKey, theirs []byte) error {
	if err := s.exchange(key, theirs); err != nil {
		return err
	}
	again := len(s.t.b) > 0 && s.t.b[0] == typeMessageHash
	s.send((&serverHello{
		random: random(randomLen), session: hello.session, suite: s.suite.id, version: version13,
		share: share{s.c.group, key.PublicKey().Bytes()}, hasKey: true, identity: uint16(at),
	}).marshal())
	if !again {
		s.changeCipherSpec()
	}
	client, server := s.derive(labelClientHandshake), s.derive(labelServerHandshake)
	if err := s.readKey(client); err != nil {
		return err
	}
	s.use(&s.c.out.half, server)
	s.send(encryptedExtensions())
	s.send(finishedMessage(finished(s.t.hash, server, s.t.sum())))
	if err := s.flush(); err != nil {
		return err
	}
	s.keys.advance(nil)
	fromClient, fromServer := s.derive(labelClientData), s.derive(labelServerData)
	s.use(&s.c.out.half, fromServer)
	if err := s.verify(client); err != nil {
		return err
	}
	return s.readKey(fromClient)
}
