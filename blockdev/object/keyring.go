package object

import (
	"errors"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// keyringSecret is a secret that the kernel keeps. It is read once.
type keyringSecret struct {
	guarded
	serial int32
}

func newKeyringSecret(p *types.SecretKeyringProperties) (*keyringSecret, error) {
	if p.Serial == 0 {
		return nil, errors.New("'serial' should not be equal to 0")
	}
	return &keyringSecret{guarded{format: p.Format, keyid: p.Keyid, iv: p.Iv}, p.Serial}, nil
}

func (s *keyringSecret) typ() string { return "secret_keyring" }

// complete asks the kernel for the key, and decodes it.
func (s *keyringSecret) complete(r *Registry) error {
	key, err := readKeyring(int(s.serial))
	if err != nil {
		return blk.Errnof(err, "Unable to read serial key %08x", uint32(s.serial))
	}
	return s.keep(r, key)
}

// readKeyring is what the kernel has of a key. Whether the daemon may read it is for the kernel to
// say: it must possess the key, or be its user with the right.
func readKeyring(serial int) (*crypto.Key, error) {
	size, err := unix.KeyctlBuffer(unix.KEYCTL_READ, serial, nil, 0)
	for err == nil {
		var key *crypto.Key
		if key, err = crypto.NewKey(size); err != nil {
			return nil, err
		}
		var n int
		if n, err = unix.KeyctlBuffer(unix.KEYCTL_READ, serial, key.Bytes(), 0); err == nil && n <= size {
			key.Shorten(n)
			return key, nil
		}
		key.Close()
		size = n // it has grown in between
	}
	return nil, err
}

func (s *keyringSecret) get(property string) (value.Value, error) {
	if property == "serial" {
		return int64(s.serial), nil
	}
	return s.guarded.get(property)
}
