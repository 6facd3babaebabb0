package tlspsk

import (
	"crypto"
	"crypto/hkdf"
	"crypto/hmac"
	"slices"
)

// Labels of secrets. Source: RFC 8446, 7.1.
const (
	labelBinder          = "ext binder"
	labelDerived         = "derived"
	labelClientHandshake = "c hs traffic"
	labelServerHandshake = "s hs traffic"
	labelClientData      = "c ap traffic"
	labelServerData      = "s ap traffic"
	labelFinished        = "finished"
	labelKey             = "key"
	labelIV              = "iv"
	labelUpdate          = "traffic upd"
)

// expandLabel is HKDF-Expand-Label. n is in bytes.
func expandLabel(h crypto.Hash, secret []byte, label string, context []byte, n int) []byte {
	info := make([]byte, 0, 64)
	info = append(info, byte(n>>8), byte(n), byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, byte(len(context)))
	info = append(info, context...)
	out, err := hkdf.Expand(h.New, secret, string(info), n)
	if err != nil {
		panic(err) // the lengths are ours
	}
	return out
}

// sum is the hash of all the parts, one after the other.
func sum(h crypto.Hash, parts ...[]byte) []byte {
	d := h.New()
	for _, p := range parts {
		d.Write(p)
	}
	return d.Sum(nil)
}

// schedule is the one secret from which others are derived at a stage of the handshake: the early
// one, then that of the handshake, then the master secret.
type schedule struct {
	hash   crypto.Hash
	secret []byte
}

func newSchedule(h crypto.Hash, psk []byte) *schedule {
	s := &schedule{hash: h}
	s.extract(make([]byte, h.Size()), psk)
	return s
}

func (s *schedule) extract(salt, ikm []byte) {
	out, err := hkdf.Extract(s.hash.New, ikm, salt)
	if err != nil {
		panic(err) // the hash is ours
	}
	clear(s.secret)
	s.secret = out
}

// derive is Derive-Secret. transcript is the hash of the messages so far.
func (s *schedule) derive(label string, transcript []byte) []byte {
	return expandLabel(s.hash, s.secret, label, transcript, s.hash.Size())
}

// advance goes on to the next stage with what the ends have agreed upon, nil if that is nothing.
func (s *schedule) advance(agreed []byte) {
	salt := s.derive(labelDerived, sum(s.hash))
	if agreed == nil {
		agreed = make([]byte, s.hash.Size())
	}
	s.extract(salt, agreed)
	clear(salt)
}

func (s *schedule) wipe() {
	if s != nil {
		clear(s.secret)
	}
}

// binder proves, in a ClientHello, that its sender has the key. transcript is the hash of all that
// comes before it. label is that of external keys, but in a test.
func (s *schedule) binder(label string, transcript []byte) []byte {
	key := s.derive(label, sum(s.hash))
	defer clear(key)
	return finished(s.hash, key, transcript)
}

// finished proves that its sender has seen the same messages, whose hash is transcript. Source: RFC
// 8446, 4.4.4.
func finished(h crypto.Hash, secret, transcript []byte) []byte {
	key := expandLabel(h, secret, labelFinished, nil, h.Size())
	defer clear(key)
	m := hmac.New(h.New, key)
	m.Write(transcript)
	return m.Sum(nil)
}

// transcript is the messages of a handshake so far. They are kept as they are, since they are short
// and their hash is wanted in the middle of one.
type transcript struct {
	hash crypto.Hash
	b    []byte
}

func (t *transcript) add(message []byte) { t.b = append(t.b, message...) }

// sum is the hash of the messages, and of more.
func (t *transcript) sum(more ...[]byte) []byte {
	return sum(t.hash, slices.Concat([][]byte{t.b}, more)...)
}

// retry puts the hash of the first ClientHello in its place, which is so when another is asked for.
// Source: RFC 8446, 4.4.1.
func (t *transcript) retry() {
	t.b = append([]byte{typeMessageHash, 0, 0, byte(t.hash.Size())}, t.sum()...)
}
