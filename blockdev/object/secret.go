package object

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"

	"qblockd/blockdev/crypto"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// guarded is what all kinds of secrets have: something that only its users may know, in memory of
// its own as long as the object exists. Clients cannot read it back.
type guarded struct {
	format *types.QCryptoSecretFormat
	keyid  *string
	iv     *string

	mu sync.Mutex
	// nil: not complete yet, or deleted
	key *crypto.Key // +checklocks:mu
}

// Secret is for drivers: see driver.Password. ok is false if the object was deleted.
func (s *guarded) Secret() (key *crypto.Key, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.key == nil {
		return nil, false, nil
	}
	key, err = crypto.CopyKey(s.key.Bytes())
	return key, true, err
}

// keep takes what was read as the secret, and decodes it first.
func (s *guarded) keep(r *Registry, key *crypto.Key) error {
	var n []byte
	var err error
	if s.keyid != nil {
		n, err = s.decrypt(r, key.Bytes())
	} else {
		n, err = s.decode(key.Bytes())
	}
	if err != nil {
		key.Close()
		return err
	}
	key.Shorten(len(n))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = key
	return nil
}

// decode makes bytes of how they are written. Like decrypt it returns the beginning of data, where
// it has put them.
func (s *guarded) decode(data []byte) ([]byte, error) {
	if types.Or(s.format, "") == types.QCryptoSecretFormatBase64 {
		return value.Base64InPlace(data)
	}
	return data, nil
}

// decrypt makes plain text of what the key of another secret was used on.
func (s *guarded) decrypt(r *Registry, data []byte) ([]byte, error) {
	key, err := r.secretData(*s.keyid)
	if err != nil {
		return nil, err
	}
	defer key.Close()
	if len(key.Bytes()) != 32 {
		return nil, errors.New("Key should be 32 bytes in length")
	}
	if s.iv == nil {
		return nil, errors.New("IV is required to decrypt secret")
	}
	iv, err := value.Base64(*s.iv)
	if err != nil {
		return nil, err
	}
	if len(iv) != aes.BlockSize {
		return nil, fmt.Errorf("IV should be 16 bytes in length not %d", len(iv))
	}
	if data, err = s.decode(data); err != nil {
		return nil, err
	}
	if len(data)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("Length %d must be a multiple of block size %d", len(data), aes.BlockSize)
	}
	block, err := aes.NewCipher(key.Bytes())
	if err != nil {
		return nil, err
	}
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(data, data)
	pad := 0
	if len(data) > 0 {
		pad = int(data[len(data)-1])
	}
	if pad > aes.BlockSize || len(data) == 0 {
		return nil, fmt.Errorf("Incorrect number of padding bytes (%d) found on decrypted data", pad)
	}
	return data[:len(data)-pad], nil
}

// get gives back everything but the secret itself.
func (s *guarded) get(property string) (value.Value, error) {
	switch property {
	case "loaded":
		return true, nil
	case "format":
		return string(types.Or(s.format, types.QCryptoSecretFormatRaw)), nil
	case "keyid":
		return types.Or(s.keyid, ""), nil
	case "iv":
		return types.Or(s.iv, ""), nil
	}
	return nil, errNotReadable
}

// set changes nothing: a secret has been read by then.
func (s *guarded) set(string, value.Value) error { return errReadOnly }

// retire overwrites the secret: those who have used it have what they need.
func (s *guarded) retire() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key.Close()
	s.key = nil
	return true
}

// secretData is a copy of the secret called id, which the caller closes.
func (r *Registry) secretData(id string) (*crypto.Key, error) {
	missing := fmt.Errorf("No secret with id '%s'", id)
	switch x := r.find(id).(type) {
	case nil:
		return nil, missing
	case interface {
		Secret() (*crypto.Key, bool, error)
	}:
		key, ok, err := x.Secret()
		if err == nil && !ok {
			err = missing
		}
		return key, err
	}
	return nil, fmt.Errorf("Object with id '%s' is not a secret", id)
}

// secret is one that is given, or in a file.
type secret struct {
	guarded
	data, file *string
}

func newSecret(p *types.SecretProperties) *secret {
	return &secret{guarded{format: p.Format, keyid: p.Keyid, iv: p.Iv}, p.Data, p.File}
}

func (s *secret) typ() string { return "secret" }

// complete reads and decodes the secret. It blocks as long as the file does.
func (s *secret) complete(r *Registry) error {
	key, err := s.load()
	s.data = nil // the caller overwrites it, if it can
	if err != nil {
		return err
	}
	return s.keep(r, key)
}

func (s *secret) load() (*crypto.Key, error) {
	switch {
	case s.file != nil && s.data != nil:
		return nil, errors.New("'file' and 'data' are mutually exclusive")
	case s.data != nil:
		return keyOf(*s.data)
	case s.file == nil:
		return nil, errors.New("Either 'file' or 'data' must be provided")
	}
	key, err := readKey(*s.file)
	if err != nil {
		what := "Error reading"
		if e := (*fs.PathError)(nil); errors.As(err, &e) && e.Op == "open" {
			what = "Failed to open"
		}
		return nil, fmt.Errorf("Unable to read %s: %s file “%[1]s”: %[3]s", *s.file, what, blk.ErrnoText(err))
	}
	return key, nil
}

// keyOf is a copy of text.
func keyOf(text string) (*crypto.Key, error) {
	key, err := crypto.NewKey(len(text))
	if err == nil {
		copy(key.Bytes(), text)
	}
	return key, err
}

const (
	firstSecret = 4 << 10
	// maxSecret is how long a file with a secret may be, in bytes.
	maxSecret = 1 << 20
)

// readKey is what a file has. No other memory has seen it.
func readKey(path string) (key *crypto.Key, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n := 0
	for size := firstSecret; ; size *= 2 {
		if size > maxSecret {
			key.Close()
			return nil, syscall.EFBIG
		}
		larger, err := crypto.NewKey(size)
		if err != nil {
			key.Close()
			return nil, err
		}
		copy(larger.Bytes(), key.Bytes())
		key.Close()
		key = larger
		k, err := io.ReadFull(f, key.Bytes()[n:])
		n += k
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			key.Shorten(n)
			return key, nil
		case err != nil:
			key.Close()
			return nil, err
		}
	}
}

func (s *secret) get(property string) (value.Value, error) {
	if property == "file" {
		return types.Or(s.file, ""), nil
	}
	return s.guarded.get(property)
}
