package object

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// secret is something that only its users may know: clients cannot read it back.
type secret struct {
	p    types.SecretProperties
	data []byte // once complete
}

func (s *secret) typ() string { return "secret" }

// complete reads and decodes the secret. It blocks as long as the file does.
func (s *secret) complete(r *Registry) error {
	data, err := s.load()
	if err != nil {
		return err
	}
	if s.p.Keyid != nil {
		data, err = s.decrypt(r, data)
	} else if types.Or(s.p.Format, "") == types.QCryptoSecretFormatBase64 {
		data, err = value.Base64(string(data))
	}
	s.data = data
	return err
}

func (s *secret) load() ([]byte, error) {
	switch {
	case s.p.File != nil && s.p.Data != nil:
		return nil, errors.New("'file' and 'data' are mutually exclusive")
	case s.p.Data != nil:
		return []byte(*s.p.Data), nil
	case s.p.File == nil:
		return nil, errors.New("Either 'file' or 'data' must be provided")
	}
	data, err := os.ReadFile(*s.p.File)
	if err != nil {
		what := "Error reading"
		if e := (*fs.PathError)(nil); errors.As(err, &e) && e.Op == "open" {
			what = "Failed to open"
		}
		return nil, fmt.Errorf("Unable to read %s: %s file “%[1]s”: %[3]s", *s.p.File, what, blk.ErrnoText(err))
	}
	return data, nil
}

// decrypt makes plain text of what the key of another secret was used on.
func (s *secret) decrypt(r *Registry, data []byte) ([]byte, error) {
	key, err := r.secretData(*s.p.Keyid)
	if err != nil {
		return nil, err
	}
	if len(key) != 32 {
		return nil, errors.New("Key should be 32 bytes in length")
	}
	if s.p.Iv == nil {
		return nil, errors.New("IV is required to decrypt secret")
	}
	iv, err := value.Base64(*s.p.Iv)
	if err != nil {
		return nil, err
	}
	if len(iv) != aes.BlockSize {
		return nil, fmt.Errorf("IV should be 16 bytes in length not %d", len(iv))
	}
	if types.Or(s.p.Format, "") == types.QCryptoSecretFormatBase64 {
		if data, err = value.Base64(string(data)); err != nil {
			return nil, err
		}
	}
	if len(data)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("Length %d must be a multiple of block size %d", len(data), aes.BlockSize)
	}
	block, err := aes.NewCipher(key)
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

// Secret is for drivers: see driver.Password.
func (s *secret) Secret() []byte { return s.data }

// secretData are the bytes of the secret called id.
func (r *Registry) secretData(id string) ([]byte, error) {
	switch x := r.find(id).(type) {
	case nil:
		return nil, fmt.Errorf("No secret with id '%s'", id)
	case *secret:
		return x.data, nil
	}
	return nil, fmt.Errorf("Object with id '%s' is not a secret", id)
}

// get gives back everything but the secret itself.
func (s *secret) get(property string) (value.Value, error) {
	switch property {
	case "loaded":
		return true, nil
	case "format":
		return string(types.Or(s.p.Format, types.QCryptoSecretFormatRaw)), nil
	case "keyid":
		return types.Or(s.p.Keyid, ""), nil
	case "iv":
		return types.Or(s.p.Iv, ""), nil
	case "file":
		return types.Or(s.p.File, ""), nil
	}
	return nil, errNotReadable
}

// set changes nothing: a secret has been read by then.
func (s *secret) set(string, value.Value) error { return errReadOnly }

// retire: those who have used the secret have what they need.
func (s *secret) retire() bool { return true }
