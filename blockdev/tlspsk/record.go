package tlspsk

import (
	"crypto/cipher"
	"encoding/binary"
	"slices"
)

// Types of records. Source: RFC 8446, 5.1.
const (
	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22
	recordData             = 23
)

// Sizes, in bytes.
const (
	headerLen = 5
	tagLen    = 16
	// maxPlain is how much one record takes.
	maxPlain = 1 << 14
	// maxInner is that with its type, maxSealed with all that its protection may add.
	maxInner  = maxPlain + 1
	maxSealed = maxPlain + 256
	// overhead is what our records add.
	overhead = headerLen + 1 + tagLen
)

// maxRecords is how many records one key is used for. The limit of AES-GCM is 2^24.5 full ones (RFC
// 8446, 5.5); that of ChaCha20-Poly1305 is beyond reach.
const maxRecords = 1 << 24

// half is one direction of a connection.
type half struct {
	suite  *suite      // nil: in the clear
	aead   cipher.AEAD // nil: in the clear, or wiped
	secret []byte      // what the key was made of, and the next will be
	iv     [12]byte
	nonce  [12]byte // here, since what is passed to an interface is in the heap
	seq    uint64
}

// clear tells whether records are not protected yet. One whose key was wiped does not go back to
// that: it can do no more.
func (h *half) clear() bool { return h.suite == nil }

// set begins to use a key. secret is from now on the half's.
func (h *half) set(s *suite, secret []byte) {
	key := expandLabel(s.hash, secret, labelKey, nil, s.keyLen)
	iv := expandLabel(s.hash, secret, labelIV, nil, len(h.iv))
	aead, err := s.aead(key)
	if err != nil {
		panic(err) // the length is ours
	}
	copy(h.iv[:], iv)
	clear(key)
	clear(iv)
	clear(h.secret)
	h.suite, h.aead, h.secret, h.seq = s, aead, secret, 0
}

// update goes on to the next key. Source: RFC 8446, 7.2.
func (h *half) update() {
	h.set(h.suite, expandLabel(h.suite.hash, h.secret, labelUpdate, nil, h.suite.hash.Size()))
}

// next is the nonce of the next record.
func (h *half) next() []byte {
	h.nonce = h.iv
	tail := h.nonce[4:]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^h.seq)
	h.seq++
	return h.nonce[:]
}

func (h *half) wipe() {
	clear(h.secret)
	clear(h.iv[:])
	clear(h.nonce[:])
	h.aead = nil
}

// seal makes a record of what is behind a place for its header in rec: in place, if there is room
// for what is added.
func (h *half) seal(typ byte, rec []byte) []byte {
	n := len(rec) - headerLen
	if h.clear() {
		putHeader(rec, typ, n)
		return rec
	}
	rec = append(slices.Grow(rec, 1+tagLen), typ)
	putHeader(rec, recordData, n+1+tagLen)
	sealed := h.aead.Seal(rec[headerLen:headerLen], h.next(), rec[headerLen:], rec[:headerLen])
	return rec[:headerLen+len(sealed)]
}

func putHeader(rec []byte, typ byte, n int) {
	rec[0], rec[1], rec[2] = typ, 3, 3
	rec[3], rec[4] = byte(n>>8), byte(n)
}

// open is what a record has, without its header, and of what type that is. It is made in place.
func (h *half) open(rec []byte) (typ byte, b []byte, err error) {
	seq := h.seq
	b, err = h.aead.Open(rec[headerLen:headerLen], h.next(), rec[headerLen:], rec[:headerLen])
	if err != nil {
		h.seq = seq // as if it had not come
		return 0, nil, fail(BadRecordMAC, "a record is not authentic")
	}
	if len(b) > maxInner {
		return 0, nil, fail(RecordOverflow, "a record is too long")
	}
	n := len(b)
	for n > 0 && b[n-1] == 0 { // padding
		n--
	}
	if n == 0 {
		return 0, nil, fail(UnexpectedMessage, "a record has no type")
	}
	return b[n-1], b[:n-1], nil
}
