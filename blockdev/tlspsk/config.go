package tlspsk

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	_ "crypto/sha256" // Config.Hash
	_ "crypto/sha512"
	"errors"

	"golang.org/x/crypto/chacha20poly1305"
)

// Config is what an end of a connection has to know.
type Config struct {
	// Hash is the one that keys are for: crypto.SHA256, which 0 stands for, or crypto.SHA384.
	Hash crypto.Hash
	// Identity and Key are a client's: the name of the key, 1 to 16384 bytes, and the key, which is
	// read during the handshake and neither kept nor changed.
	Identity string
	Key      []byte
	// Lookup is a server's: the key of that name, and whether there is one. The handshake wipes what
	// it returns. A peer cannot see what it returned, but how long it took.
	Lookup func(identity string) (key []byte, ok bool)
}

// maxIdentity is the most that the name of a key takes, in bytes.
const maxIdentity = 1 << 14

var (
	errHash     = errors.New("keys are for SHA-256 or SHA-384")
	errIdentity = errors.New("the name of a key has 1 to 16384 bytes")
	errKey      = errors.New("the key is empty")
	errLookup   = errors.New("a server needs a way to look keys up")
)

func (c *Config) hash() crypto.Hash {
	if c.Hash == 0 {
		return crypto.SHA256
	}
	return c.Hash
}

// check finds what cannot work.
func (c *Config) check(client bool) error {
	switch {
	case c.hash() != crypto.SHA256 && c.hash() != crypto.SHA384:
		return errHash
	case !client && c.Lookup == nil:
		return errLookup
	case client && (c.Identity == "" || len(c.Identity) > maxIdentity):
		return errIdentity
	case client && len(c.Key) == 0:
		return errKey
	}
	return nil
}

// suite is a way to protect records. Source: RFC 8446, B.4.
type suite struct {
	id     uint16
	name   string
	hash   crypto.Hash
	keyLen int // bytes
	aead   func(key []byte) (cipher.AEAD, error)
}

// suites are in the order in which a server prefers them.
var suites = []*suite{
	{0x1301, "TLS_AES_128_GCM_SHA256", crypto.SHA256, 16, aesGCM},
	{0x1303, "TLS_CHACHA20_POLY1305_SHA256", crypto.SHA256, chacha20poly1305.KeySize, chacha20poly1305.New},
	{0x1302, "TLS_AES_256_GCM_SHA384", crypto.SHA384, 32, aesGCM},
}

func aesGCM(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// group is a way to agree on a secret. Source: RFC 8446, 4.2.7.
type group struct {
	id    uint16
	curve ecdh.Curve
}

// groups are in the order in which both ends prefer them.
var groups = []group{{0x001d, ecdh.X25519()}, {0x0017, ecdh.P256()}}
