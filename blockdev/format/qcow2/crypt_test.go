package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// words are the secrets of tests: each is called as its text, but "none", which is not there.
func words(secret string) (*crypto.Key, error) {
	if secret == "none" {
		return nil, errors.New("No secret with id 'none'")
	}
	return crypto.CopyKey([]byte(secret))
}

// newKeys are options for a new image of that format, made in no time.
func newKeys(format string) *types.QCryptoBlockCreateOptions {
	switch format {
	case "luks":
		return &types.QCryptoBlockCreateOptions{
			Format: types.QCryptoBlockFormatLuks,
			U:      &types.QCryptoBlockCreateOptionsLUKS{KeySecret: ptr("key"), IterTime: ptr(int64(0))},
		}
	case "aes":
		return &types.QCryptoBlockCreateOptions{
			Format: types.QCryptoBlockFormatQcow, U: &types.QCryptoBlockOptionsQCow{KeySecret: ptr("key")},
		}
	}
	return nil
}

// key opens an encrypted image.
func key(format, secret string) *types.BlockdevQcow2Encryption {
	e := &types.BlockdevQcow2Encryption{Format: types.BlockdevQcow2EncryptionFormat(format)}
	s := &secret
	if secret == "" {
		s = nil
	}
	if format == "aes" {
		e.U = &types.QCryptoBlockOptionsQCow{KeySecret: s}
	} else {
		e.U = &types.QCryptoBlockOptionsLUKS{KeySecret: s}
	}
	return e
}

// keyed is c with the key of the image in it, if that is encrypted.
func keyed(c config) config {
	b := make([]byte, layout.HeaderSizeV2)
	if c.password = words; c.options.Encrypt != nil || readPadded(req(), c.file, c.file.Size(), blk.Buf(b), 0) != nil {
		return c
	}
	switch be.Uint32(b[32:]) {
	case layout.CryptAES:
		c.options.Encrypt = key("aes", "key")
	case layout.CryptLUKS:
		c.options.Encrypt = key("luks", "key")
	}
	return c
}

// TestModelEncrypted is TestModel for encrypted images.
func TestModelEncrypted(t *testing.T) {
	i := uint64(0)
	for _, crypt := range []string{"luks", "aes"} {
		for _, sh := range []shape{
			{cs: 512, bits: 16, v: "v3"}, {cs: 512, bits: 1, v: "v3", back: true}, {cs: 4096, bits: 64, v: "v3", lazy: true},
			{cs: 65536, bits: 16, v: "v3", back: true}, {cs: 65536, bits: 16, v: "v2"}, {cs: 1024, bits: 16, v: "v2", back: true},
			{cs: 2 << 20, bits: 16, v: "v3"}, {cs: 16384, bits: 16, v: "v3", ext: true, back: true},
			{cs: 65536, bits: 8, v: "v3", ext: true}, {cs: 4096, bits: 16, v: "v3", data: "data", back: true},
			{cs: 65536, bits: 16, v: "v3", data: "raw"}, {cs: 16384, bits: 16, v: "v3", ext: true, data: "raw"},
		} {
			sh.crypt = crypt
			i++
			t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
				t.Parallel()
				testShape(t, sh, 1000+i)
			})
		}
	}
}

// What is wrong with options, secrets and headers has the reference's words.
func TestUnlockErrors(t *testing.T) {
	plain := mustCreate(t, CreateOptions{Size: 1 << 20})
	aes := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "aes"})
	luks := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks"})
	// The header's extensions begin with that of the encryption.
	with := func(at int, v ...byte) *drivertest.MemFile {
		b := bytes.Clone(luks.Bytes())
		copy(b[at:], v)
		return drivertest.MemFileOf(b)
	}
	const noKey = "Parameter 'encrypt.key-secret' is required for cipher"
	at := int(be.Uint64(luks.Bytes()[layout.HeaderSize+8:]))
	for _, c := range []struct {
		name string
		file *drivertest.MemFile
		key  *types.BlockdevQcow2Encryption
		want string
	}{
		{"not encrypted", plain, key("luks", "key"), "No encryption in image header, but options specified format 'luks'"},
		{"no options", luks, nil, noKey},
		{"no secret", luks, key("luks", ""), noKey},
		{"no such secret", luks, key("luks", "none"), "No secret with id 'none'"},
		{"wrong", luks, key("luks", "wrong"), "Invalid password, cannot unlock any keyslot"},
		{"as aes", luks, key("aes", "key"), "Header reported 'luks' encryption format but options specify 'aes'"},
		{"as luks", aes, key("luks", "key"), "Header reported 'aes' encryption format but options specify 'luks'"},
		{"aes, no secret", aes, key("aes", ""), noKey},
		{"aes, wrong", aes, key("aes", "wrong"), ""}, // nothing can tell
		{"method", with(35, 7), nil, "Unsupported encryption method 7"},
		{"no extension", with(layout.HeaderSize, 0, 0, 0, 0), key("luks", "key"), "Missing CRYPTO header for crypt method 2"},
		{"extension of aes", with(35, 1), key("aes", "key"), "CRYPTO header extension only expected with LUKS encryption method"},
		{"size", with(layout.HeaderSize+7, 24), key("luks", "key"), "CRYPTO header extension size 24, but expected size 16"},
		{"place", with(layout.HeaderSize+15, 1), key("luks", "key"), "Encryption header offset '" + fmt.Sprint(at+1) + "' is not a multiple of cluster size '65536'"},
		{"short", with(layout.HeaderSize+16, 0, 0, 0, 0, 0, 0, 2, 0), key("luks", "key"), "Request for data outside of extension header"},
		{"no material", with(layout.HeaderSize+16, 0, 0, 0, 0, 0, 0, 16, 0), key("luks", "key"), "Request for data outside of extension header"},
		{"nothing there", with(layout.HeaderSize+8, 1), key("luks", "key"), "Volume is not in LUKS format"},
		{"nowhere", with(layout.HeaderSize+8, 0xff), key("luks", "key"), "Could not read encryption header: Input/output error"},
		{"no magic", with(at, 0), key("luks", "key"), "Volume is not in LUKS format"},
		{"huge", with(layout.HeaderSize+16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), key("luks", "key"), ""},
	} {
		s, err := openImage(req(), config{file: mem{c.file}, password: words, options: Options{
			CacheCleanInterval: ptr(int64(0)), Encrypt: c.key,
		}})
		switch {
		case err != nil && err.Error() != c.want, err == nil && c.want != "":
			t.Errorf("%s: %v", c.name, err)
		case err == nil:
			mustClose(t, s)
		}
	}
}

// Two disks with the same content are not the same in the file, and nothing of the content is.
func TestNothingInTheClear(t *testing.T) {
	for _, crypt := range []string{"luks", "aes"} {
		f := mustCreate(t, CreateOptions{Size: 4 << 20, Crypt: crypt, ClusterSize: ptr(uint64(4096))})
		s := mustOpen(t, mem{f}, config{})
		text := bytes.Repeat([]byte("the quick brown "), 32)
		for off := int64(0); off < 1<<20; off += 512 {
			if err := s.WriteAt(req(), blk.Buf(text), off, 0); err != nil {
				t.Fatal(err)
			}
		}
		err := s.WriteAt(req(), blk.Buf(make([]byte, 4096)), 2<<20, blk.Compressed)
		if !errors.Is(err, blk.ErrNotSupported) {
			t.Errorf("%s: what is compressed would be readable: %v", crypt, err)
		}
		mustClose(t, s)
		if bytes.Contains(f.Bytes(), text[:16]) {
			t.Errorf("%s: the content is in the file", crypt)
		}
		seen := map[string]bool{}
		data := f.Bytes()[1<<16:]
		for ; len(data) >= 512; data = data[512:] {
			if crypt == "luks" && len(data) < 1<<20 && seen[string(data[:512])] && !blk.IsZero(data[:512]) {
				t.Fatalf("%s: two sectors are the same", crypt)
			}
			seen[string(data[:512])] = true
		}
	}
}

// Where something of a disk is cannot be used by others, as it is not what they would read.
func TestEncryptedStatus(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks", Preallocation: blk.PreallocMetadata})
	s := mustOpen(t, mem{f}, config{})
	defer mustClose(t, s)
	if x, err := s.Status(req(), 0, 1<<20); err != nil || !x.Zero || x.OffValid || x.Recurse {
		t.Fatalf("preallocated: %+v %v", x, err)
	}
	b := bytes.Repeat([]byte{7}, 4<<10)
	if err := s.WriteAt(req(), blk.Buf(b), 64<<10, 0); err != nil {
		t.Fatal(err)
	}
	if x, err := s.Status(req(), 64<<10, 64<<10); err != nil || !x.Data || x.Zero || x.OffValid || x.Recurse {
		t.Fatalf("written: %+v %v", x, err)
	}
	got := make([]byte, 64<<10)
	err := s.ReadAt(req(), blk.Buf(got), 64<<10, 0)
	if err != nil || !bytes.Equal(got[:4<<10], b) || !blk.IsZero(got[4<<10:]) {
		t.Fatalf("around what was written: %v", err)
	}
	m := &blk.Mapping{}
	defer m.Release()
	if err := s.Map(req(), 64<<10, 64<<10, m); err != nil || m.N() != 0 {
		t.Fatalf("%d bytes are mapped: %v", m.N(), err)
	}
	if err := s.CopyFrom(req(), 0, []blk.HostRange{{FD: 0, N: 65536}}, 0); !errors.Is(err, blk.ErrNotSupported) {
		t.Fatalf("copied: %v", err)
	}
	q := req()
	q.NoWait = true
	if err := s.WriteAt(q, blk.Buf(make([]byte, 2<<20)), 0, 0); !errors.Is(err, blk.ErrWouldBlock) {
		t.Fatalf("two writes to the file, and none may wait: %v", err)
	}
}

// An entry that leads into the header with the keys takes nothing of it.
func TestKeysAreNotOverwritten(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks"})
	s := mustOpen(t, mem{f}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(req()); err != nil {
		t.Fatal(err)
	}
	p := peek(s)
	l2, keys := int64(p.l1.at(0)&layout.OffsetMask), int64(p.ext.Crypto.Offset)
	mustClose(t, s)
	b := f.Bytes()
	be.PutUint64(b[l2:], uint64(keys)|layout.Copied)
	before := bytes.Clone(b[keys : keys+4096])
	s = mustOpen(t, mem{drivertest.MemFileOf(b)}, config{})
	if err := s.WriteAt(req(), blk.Buf(make([]byte, 512)), 0, 0); !errors.Is(err, syscall.EIO) {
		t.Fatalf("written over the keys: %v", err)
	}
	if got := make([]byte, 4096); s.readFile(req(), blk.Buf(got), keys) != nil || !bytes.Equal(got, before) {
		t.Fatal("the header has changed")
	}
	_ = s.Close()
}

// The header's clusters are counted: a check finds leaks and references that are missing.
func TestCheckCountsKeys(t *testing.T) {
	f := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks", ClusterSize: ptr(uint64(4096))})
	s := mustOpen(t, mem{f}, config{readOnly: true})
	sound(t, s, false)
	p := peek(s)
	block := int64(p.reft[0] & layout.ReftMask)
	first := int64(p.ext.Crypto.Offset) >> 12
	_ = s.Close()
	b := f.Bytes()
	clear(b[block+2*first:][:2])
	s = mustOpen(t, mem{drivertest.MemFileOf(b)}, config{readOnly: true})
	defer s.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if res, err := s.check(req(), false); err != nil || res.Corruptions != 1 {
		t.Fatalf("%+v %v", res, err)
	}
}

// A chain has a key for each image.
func TestChainOfKeys(t *testing.T) {
	const size = 1 << 20
	make1 := func(secret string, o CreateOptions) *drivertest.MemFile {
		f := drivertest.NewMemFile(0)
		x := o.schema()
		x.Encrypt = newKeys("luks")
		x.Encrypt.U.(*types.QCryptoBlockCreateOptionsLUKS).KeySecret = &secret
		if err := createWith(req(), mem{f}, nil, "", x, words); err != nil {
			t.Fatal(err)
		}
		return f
	}
	base, top := make1("a", CreateOptions{Size: size}), make1("b", CreateOptions{Size: size, BackingFile: ptr("base")})
	lower := mustOpen(t, mem{base}, config{options: Options{Encrypt: key("luks", "a")}})
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i >> 9)
	}
	if err := lower.WriteAt(req(), blk.Buf(want), 0, 0); err != nil {
		t.Fatal(err)
	}
	upper := mustOpen(t, mem{top}, config{
		options: Options{Encrypt: key("luks", "b")}, backing: func() file { return imageFileOf{lower} },
	})
	for off := 512; off < size; off += 100 << 10 {
		clear(want[off:][:1024])
		if err := upper.WriteAt(req(), blk.Buf(make([]byte, 1024)), int64(off), 0); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, size)
	if err := upper.ReadAt(req(), blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the chain reads differently: %v", err)
	}
	mustClose(t, upper)
	mustClose(t, lower)
}

// imageFileOf is an open image as a backing file.
type imageFileOf struct{ *image }

func (i imageFileOf) Caps() graph.Caps { return graph.Caps{} }
func (i imageFileOf) Size() int64      { return i.size.Load() }
func (i imageFileOf) Resize(context.Context, int64, bool, blk.Prealloc) error {
	return blk.ErrNotSupported
}
