package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/crypto/luks"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// seal is how the guest data of an encrypted image are encrypted. Metadata and compressed clusters
// never are.
type seal struct {
	cipher *crypto.Cipher
	// header has the keys; nil: the password is the key (aes).
	header atomic.Pointer[luks.Header]
	secret string // that the image was opened with
}

// byHost tells whether the number of a sector is that of its place in the file with the data; it is
// that of its place on the disk otherwise.
func (e *seal) byHost() bool { return e.header.Load() != nil }

// sector is the number of the sector at offset host of the file, which is at off of the disk.
func (e *seal) sector(host, off int64) uint64 {
	if e.byHost() {
		off = host
	}
	return uint64(off) / crypto.SectorSize
}

// guestData are the files with the guest data, and how those are encrypted.
type guestData struct {
	config
	seal *seal // nil: they are not
}

// readData reads guest data that are at off of the disk.
func (s *guestData) readData(r *blk.Req, v blk.Vec, host, off int64) error {
	f := s.data()
	if s.seal == nil {
		return readPadded(r, f, f.Size(), v, host)
	}
	return s.seal.cipher.Read(v, s.seal.sector(host, off), func(part blk.Vec, at int64) error {
		return readPadded(r, f, f.Size(), part, host+at)
	})
}

// writeData writes guest data that are at off of the disk.
func (s *guestData) writeData(r *blk.Req, v blk.Vec, host, off int64) error {
	f := s.data()
	if s.seal == nil {
		return f.WriteAt(r, v, host, 0)
	}
	return s.seal.cipher.Write(v, s.seal.sector(host, off), func(part blk.Vec, at int64) error {
		return f.WriteAt(r, part, host+at, 0)
	})
}

// zeroInit tells whether guest data that were never written read as zeroes. An encrypted file grows
// by noise, and so it is with data that are encrypted by the image.
func (s *guestData) zeroInit() bool {
	return s.seal == nil && !s.sealing && s.data().Caps().ZeroInit
}

// unwritten tells whether host offset off of the file with the guest data, which was written up to
// end, reads as zeroes whatever is written behind it.
func (s *guestData) unwritten(off, end int64) bool { return off >= end && s.zeroInit() }

// splits tells whether a write of n bytes to one place is more than one to the file.
func (s *guestData) splits(n int64) bool { return s.seal != nil && n > crypto.MaxBounce }

// passwords finds the text of a secret, a copy, which the caller closes.
type passwords func(secret string) (*crypto.Key, error)

// secretOf is what the options say of an encrypted image: the name that they give the format, ""
// without any, and the secret.
func secretOf(o *types.BlockdevQcow2Encryption) (format string, secret *string) {
	if o == nil {
		return "", nil
	}
	switch u := o.U.(type) {
	case *types.QCryptoBlockOptionsLUKS:
		secret = u.KeySecret
	case *types.QCryptoBlockOptionsQCow:
		secret = u.KeySecret
	}
	return string(o.Format), secret
}

// unsaid stands for the format that the image has, until that is known.
const unsaid types.BlockdevQcow2EncryptionFormat = ""

// sayFormat has the options say how the image is encrypted, if they leave that to it.
func sayFormat(o *types.BlockdevQcow2Encryption, h *layout.Header) {
	if o == nil || o.Format != unsaid {
		return
	}
	_, secret := secretOf(o)
	o.Format, o.U = types.BlockdevQcow2EncryptionFormatLuks, &types.QCryptoBlockOptionsLUKS{KeySecret: secret}
	if h.CryptMethod == layout.CryptAES {
		o.Format, o.U = types.BlockdevQcow2EncryptionFormatAes, &types.QCryptoBlockOptionsQCow{KeySecret: secret}
	}
}

// checkEncrypt refuses options that are not for the image's kind of encryption.
func checkEncrypt(o *types.BlockdevOptionsQcow2, h *layout.Header) error {
	format, _ := secretOf(o.Encrypt)
	if h.CryptMethod == layout.CryptNone {
		if format != "" {
			return fmt.Errorf("No encryption in image header, but options specified format '%s'", format)
		}
		return nil
	}
	names := map[uint32]string{layout.CryptAES: "aes", layout.CryptLUKS: "luks"}
	switch name, ok := names[h.CryptMethod]; {
	case !ok:
		return fmt.Errorf("Unsupported encryption method %d", int32(h.CryptMethod)) // QEMU shows a signed number
	case format != "" && format != name:
		return fmt.Errorf("Header reported '%s' encryption format but options specify '%s'", name, format)
	}
	return nil
}

// errNoKey: an encrypted image without a password is of no use.
var errNoKey = errors.New("Parameter 'encrypt.key-secret' is required for cipher")

// wordOf is what a secret says, a copy, which the caller closes.
func (s *config) wordOf(secret *string) (*crypto.Key, error) {
	if secret == nil {
		return nil, errNoKey
	}
	return s.password(*secret)
}

// unlock makes the cipher of an encrypted image. Who fails to open it then closes it.
// +checklocks:s.mu
func (s *imageFile) unlock(r *blk.Req) error {
	if s.hdr.CryptMethod == layout.CryptNone || s.bare {
		return nil
	}
	if s.hdr.CryptMethod == layout.CryptLUKS && s.ext.Crypto == nil {
		return fmt.Errorf("Missing CRYPTO header for crypt method %d", s.hdr.CryptMethod)
	}
	_, secret := secretOf(s.options.Encrypt)
	word, err := s.wordOf(secret)
	if err != nil {
		return err
	}
	defer word.Close()
	e := &seal{secret: *secret}
	if s.hdr.CryptMethod == layout.CryptAES {
		e.cipher, err = legacyCipher(word.Bytes())
	} else {
		err = e.openHeader(ctxOf(r), keyArea{s, r}, word.Bytes())
	}
	if err != nil {
		return err
	}
	s.seal = e
	return nil
}

// legacyCipher is that of images whose key is the beginning of the password, up to 16 bytes.
func legacyCipher(word []byte) (*crypto.Cipher, error) {
	spec := crypto.Spec{
		Alg: types.QCryptoCipherAlgorithmAes128, Mode: types.QCryptoCipherModeCbc, IV: types.QCryptoIVGenAlgorithmPlain64,
	}
	key, err := crypto.NewKey(spec.KeySize())
	if err != nil {
		return nil, err
	}
	defer key.Close()
	copy(key.Bytes(), word)
	return crypto.New(spec, key.Bytes())
}

func (e *seal) openHeader(ctx context.Context, st luks.Store, word []byte) error {
	h, err := luks.Read(st, false)
	if err != nil {
		return err
	}
	master, err := h.Unlock(ctx, st, word)
	if err != nil {
		return err
	}
	defer master.Close()
	if e.cipher, err = crypto.New(h.Spec, master.Bytes()); err != nil {
		return err
	}
	e.header.Store(h)
	return nil
}

// forget overwrites the keys.
func (s *guestData) forget() {
	if s.seal != nil {
		s.seal.cipher.Close()
	}
}

// keyArea is the part of an image that has the header with the keys. mu is held while it is used,
// which checklocks cannot see through an interface.
type keyArea struct {
	s *imageFile
	r *blk.Req
}

var errOutside = errors.New("Request for data outside of extension header")

// place is where offset off of the area is in the file.
// +checklocksignore
func (k keyArea) place(off, n int64) (int64, error) {
	c := k.s.ext.Crypto
	switch {
	case uint64(off)+uint64(n) > c.Length:
		return 0, errOutside
	case c.Offset > math.MaxInt64-uint64(off)-uint64(n):
		return 0, errIO
	}
	return int64(c.Offset) + off, nil
}

// ReadAt implements luks.Store.
// +checklocksignore
func (k keyArea) ReadAt(b []byte, off int64) error {
	at, err := k.place(off, int64(len(b)))
	if err == nil {
		err = k.s.readFile(k.r, blk.Buf(b), at)
	}
	if err != nil && err != errOutside {
		return wrap("Could not read encryption header", err)
	}
	return err
}

// WriteAt implements luks.Store.
// +checklocksignore
func (k keyArea) WriteAt(b []byte, off int64) error {
	at, err := k.place(off, int64(len(b)))
	if err != nil {
		return err
	}
	if err := k.s.writeMeta(k.r, b, at, 0); err != nil {
		return wrap("Could not write encryption header", err)
	}
	return nil
}

// Flush implements luks.Store.
// +checklocksignore
func (k keyArea) Flush() error { return k.s.barrier(k.r) }

// info is what queries show of the encryption.
func (e *seal) info() *types.ImageInfoSpecificQCow2Encryption {
	h := e.header.Load()
	if h == nil {
		return &types.ImageInfoSpecificQCow2Encryption{Format: types.BlockdevQcow2EncryptionFormatAes}
	}
	info := h.Info()
	return &types.ImageInfoSpecificQCow2Encryption{Format: types.BlockdevQcow2EncryptionFormatLuks, U: &info}
}

// encrypt makes an empty image an encrypted one, as o says.
func (s *image) encrypt(r *blk.Req, o *types.QCryptoBlockCreateOptions) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := o.U.(*types.QCryptoBlockOptionsQCow); ok {
		word, err := s.wordOf(u.KeySecret)
		if err != nil {
			return err
		}
		word.Close() // it is not for the image, but has to be there
		s.hdr.CryptMethod = layout.CryptAES
		return s.enterCrypt(r)
	}
	u := o.U.(*types.QCryptoBlockCreateOptionsLUKS)
	word, err := s.wordOf(u.KeySecret)
	if err != nil {
		return err
	}
	defer word.Close()
	h, master, millis, err := luks.NewAs(ctxOf(r), u)
	if err != nil {
		return err
	}
	defer master.Close()
	n := s.geo.Clusters(h.PayloadOffset())
	first, _, err := s.allocate(r, n, n, "encryption header")
	if err != nil {
		return wrap(fmt.Sprintf("Cannot allocate cluster for LUKS header size %d", h.PayloadOffset()), err)
	}
	at := first << s.cb
	s.noteEnd(at + n<<s.cb)
	s.wrote++
	if err := s.file.Zero(r, at, n<<s.cb, 0); err != nil {
		return wrap("Could not zero fill encryption header", err)
	}
	s.hdr.CryptMethod = layout.CryptLUKS
	s.ext.Crypto = &layout.Crypto{Offset: uint64(at), Length: uint64(h.PayloadOffset())}
	if err := h.SetKey(ctxOf(r), keyArea{&s.imageFile, r}, 0, master, word.Bytes(), millis); err != nil {
		return err
	}
	return s.enterCrypt(r)
}

// enterCrypt makes the header say that the image is encrypted, after all that it then refers to.
// +checklocks:s.mu
func (s *image) enterCrypt(r *blk.Req) error {
	if err := s.flush(r); err != nil {
		return err
	}
	if err := s.updateHeader(r); err != nil {
		return wrap("Cannot write encryption header", err)
	}
	return nil
}
