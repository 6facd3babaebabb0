package tlspsk

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"slices"
)

// client is the handshake of who begins. Source: RFC 8446, 2.2.
func (s *shake) client() error {
	s.keys = newSchedule(s.t.hash, s.c.config.Key)
	hello, key, err := s.greeting()
	if err != nil {
		return err
	}
	s.hello(hello)
	if err := s.flush(); err != nil {
		return err
	}
	answer, err := s.serverHello(hello)
	if err != nil {
		return err
	}
	s.changeCipherSpec()
	if answer.retry() {
		if key, err = s.again(hello, answer, key); err != nil {
			return err
		}
		first := answer
		if answer, err = s.serverHello(hello); err != nil {
			return err
		}
		switch {
		case answer.retry():
			return fail(UnexpectedMessage, "the server asks twice for another share")
		case answer.suite != first.suite:
			return fail(IllegalParameter, "the server changes its mind")
		}
	}
	if err := s.agree(hello, answer, key); err != nil {
		return err
	}
	return s.finishClient()
}

// greeting is the ClientHello, with a share of the first group.
func (s *shake) greeting() (*clientHello, *ecdh.PrivateKey, error) {
	h := &clientHello{
		random: random(randomLen), session: random(maxSession), versions: []uint16{version13}, modes: []byte{pskDHE},
		identities: []identity{{[]byte(s.c.config.Identity), make([]byte, s.t.hash.Size())}},
	}
	for _, x := range s.c.suites {
		if x.hash == s.t.hash {
			h.suites = append(h.suites, x.id)
		}
	}
	for _, g := range s.c.groups {
		h.groups = append(h.groups, g.id)
	}
	key, err := s.share(h, s.c.groups[0])
	return h, key, err
}

// share makes a key of a group, whose public half goes into h.
func (s *shake) share(h *clientHello, g group) (*ecdh.PrivateKey, error) {
	key, err := g.curve.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	h.shares = []share{{g.id, key.PublicKey().Bytes()}}
	return key, nil
}

// hello sends a ClientHello, whose end proves that we have the key.
func (s *shake) hello(h *clientHello) {
	raw := h.marshal()
	size := s.t.hash.Size()
	unbound := raw[:len(raw)-2-1-size]
	copy(raw[len(raw)-size:], s.keys.binder(labelBinder, s.t.sum(unbound)))
	s.send(raw)
}

// serverHello waits for the answer of the server, and checks what goes for both kinds of it.
func (s *shake) serverHello(hello *clientHello) (*serverHello, error) {
	raw, err := s.message(typeServerHello)
	if err != nil {
		return nil, err
	}
	h, err := parseServerHello(raw)
	switch {
	case err != nil:
		return nil, err
	case h.version == 0:
		return nil, fail(ProtocolVersion, "the server does not speak TLS 1.3")
	case h.version != version13, !bytes.Equal(h.session, hello.session), !slices.Contains(hello.suites, h.suite):
		return nil, fail(IllegalParameter, "the server takes what was not offered")
	case h.unasked:
		return nil, fail(UnsupportedExtension, "the server answers what it was not asked")
	}
	if h.retry() {
		s.t.retry()
	}
	s.t.add(raw)
	return h, nil
}

// again does what a HelloRetryRequest asks for. The key stays if that is not for another share.
func (s *shake) again(hello *clientHello, asked *serverHello, key *ecdh.PrivateKey) (*ecdh.PrivateKey, error) {
	others := s.c.groups[1:]
	i := slices.IndexFunc(others, func(g group) bool { return g.id == asked.share.group })
	if i < 0 && (asked.share.group != 0 || asked.cookie == nil) {
		return nil, fail(IllegalParameter, "the server asks for another share in vain")
	}
	if len(asked.cookie) > maxCookie {
		return nil, fail(IllegalParameter, "the server's cookie is too long")
	}
	if len(s.c.in.hand) > 0 {
		return nil, fail(UnexpectedMessage, "the server does not wait for the client")
	}
	hello.cookie = asked.cookie
	if i >= 0 {
		var err error
		if key, err = s.share(hello, others[i]); err != nil {
			return nil, err
		}
	}
	s.hello(hello)
	return key, s.flush()
}

// agree makes the keys of the handshake.
func (s *shake) agree(hello *clientHello, answer *serverHello, key *ecdh.PrivateKey) error {
	switch {
	case !answer.hasKey:
		return fail(HandshakeFailure, "the server does not take the key")
	case int(answer.identity) >= len(hello.identities), answer.share.group != hello.shares[0].group:
		return fail(IllegalParameter, "the server takes what was not offered")
	}
	s.choose(answer.suite, answer.share.group)
	if err := s.exchange(key, answer.share.key); err != nil {
		return err
	}
	s.derive(labelClientHandshake)
	s.use(&s.c.out.half, s.secrets[0])
	return s.readKey(s.derive(labelServerHandshake))
}

// choose notes what is agreed upon.
func (s *shake) choose(id, g uint16) {
	for _, x := range s.c.suites {
		if x.id == id {
			s.suite = x
		}
	}
	s.c.suite, s.c.group = s.suite, g
}

// exchange makes the secret of the handshake with the share of the peer.
func (s *shake) exchange(key *ecdh.PrivateKey, peer []byte) error {
	public, err := key.Curve().NewPublicKey(peer)
	if err != nil {
		return fail(IllegalParameter, "a share is no point of its group")
	}
	shared, err := key.ECDH(public)
	if err != nil {
		return fail(IllegalParameter, "a share is good for nothing")
	}
	s.keys.advance(shared)
	clear(shared)
	return nil
}

// verify waits for the proof that the peer has seen the same messages.
func (s *shake) verify(secret []byte) error {
	want := finished(s.t.hash, secret, s.t.sum())
	raw, err := s.message(typeFinished)
	if err != nil {
		return err
	}
	if !hmac.Equal(raw[messageHeader:], want) {
		return fail(DecryptError, "the peer has seen other messages than were sent")
	}
	s.t.add(raw)
	return nil
}

// finishClient is the rest, which is encrypted.
func (s *shake) finishClient() error {
	raw, err := s.message(typeEncryptedExtensions)
	if err != nil {
		return err
	}
	if err := checkEncryptedExtensions(raw[messageHeader:]); err != nil {
		return err
	}
	s.t.add(raw)
	if err := s.verify(s.secrets[1]); err != nil {
		return err
	}
	s.keys.advance(nil)
	ours, theirs := s.derive(labelClientData), s.derive(labelServerData)
	if err := s.readKey(theirs); err != nil {
		return err
	}
	s.send(finishedMessage(finished(s.t.hash, s.secrets[0], s.t.sum())))
	s.use(&s.c.out.half, ours)
	return s.flush()
}
