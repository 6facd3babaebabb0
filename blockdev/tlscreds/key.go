package tlscreds

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"hash"
)

var (
	errNoKey   = errors.New("The requested data were not available.")
	errDecrypt = errors.New("Decryption has failed.")
)

// parseKey reads the key in a file, which password decrypts if it is encrypted. The key in DER that
// it returns is for the caller to wipe.
func parseKey(file, password []byte) (der []byte, err error) {
	for {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			return nil, errNoKey
		}
		switch b.Type {
		case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
			if b.Headers["DEK-Info"] == "" {
				return b.Bytes, nil
			}
			//lint:ignore SA1019 there are such keys; how safe they are in their file is not ours to say
			if der, err = x509.DecryptPEMBlock(b, password); err != nil {
				return nil, errDecrypt
			}
			return der, nil
		case "ENCRYPTED PRIVATE KEY":
			return decryptKey(b.Bytes, password)
		}
	}
}

// What PKCS #5 (RFC 8018) has of encrypted keys.
type (
	encryptedKey struct {
		Algorithm pkix.AlgorithmIdentifier
		Data      []byte
	}
	pbes2 struct{ Derivation, Cipher pkix.AlgorithmIdentifier }
	kdf   struct {
		Salt       []byte
		Iterations int
		KeyLength  int                      `asn1:"optional"`
		Hash       pkix.AlgorithmIdentifier `asn1:"optional"`
	}
)

var (
	oidPBES2  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
)

// kdfHashes and keyCiphers are by object identifier.
var kdfHashes = map[string]func() hash.Hash{
	"":                   sha1.New,
	"1.2.840.113549.2.7": sha1.New, "1.2.840.113549.2.8": sha256.New224, "1.2.840.113549.2.9": sha256.New,
	"1.2.840.113549.2.10": sha512.New384, "1.2.840.113549.2.11": sha512.New,
}

var keyCiphers = map[string]struct {
	key int // bytes
	new func(key []byte) (cipher.Block, error)
}{
	"2.16.840.1.101.3.4.1.2":  {16, aes.NewCipher},
	"2.16.840.1.101.3.4.1.22": {24, aes.NewCipher},
	"2.16.840.1.101.3.4.1.42": {32, aes.NewCipher},
	"1.2.840.113549.3.7":      {24, des.NewTripleDESCipher},
}

// maxIterations bounds the time that a file can make us take.
const maxIterations = 10_000_000

// decryptKey decrypts a key by PBES2.
func decryptKey(der, password []byte) ([]byte, error) {
	var k encryptedKey
	var p pbes2
	var d kdf
	if !parseAll(der, &k) || !k.Algorithm.Algorithm.Equal(oidPBES2) || !parseAll(k.Algorithm.Parameters.FullBytes, &p) ||
		!p.Derivation.Algorithm.Equal(oidPBKDF2) || !parseAll(p.Derivation.Parameters.FullBytes, &d) {
		return nil, errors.New("The cipher type is unsupported.")
	}
	newHash := kdfHashes[d.Hash.Algorithm.String()]
	c, known := keyCiphers[p.Cipher.Algorithm.String()]
	var iv []byte
	switch {
	case newHash == nil || !known || !parseAll(p.Cipher.Parameters.FullBytes, &iv):
		return nil, errors.New("The cipher type is unsupported.")
	case d.Iterations < 1 || d.Iterations > maxIterations || d.KeyLength != 0 && d.KeyLength != c.key:
		return nil, errDecrypt
	}
	key, err := pbkdf2.Key(newHash, string(password), d.Salt, d.Iterations, c.key)
	if err != nil {
		return nil, errDecrypt
	}
	defer clear(key)
	block, err := c.new(key)
	if err != nil || len(iv) != block.BlockSize() || len(k.Data) == 0 || len(k.Data)%len(iv) != 0 {
		return nil, errDecrypt
	}
	out := k.Data
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(out, out)
	pad := int(out[len(out)-1])
	if pad < 1 || pad > len(iv) || !bytes.Equal(out[len(out)-pad:], bytes.Repeat([]byte{byte(pad)}, pad)) {
		clear(out)
		return nil, errDecrypt
	}
	return out[:len(out)-pad], nil
}

// parseAll reads a structure that is all there is.
func parseAll(der []byte, v any) bool {
	rest, err := asn1.Unmarshal(der, v)
	return err == nil && len(rest) == 0
}
