package qcow2

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"

	"qblockd/schema/types"
)

// encryption is the options of qemu-img for "aes", or "luks/CIPHER/MODE/GENERATOR/ITS HASH/HASH".
func encryption(crypt string) string {
	w := strings.Split(crypt, "/")
	o := "encrypt.format=" + w[0] + ",encrypt.key-secret=k"
	if len(w) == 1 {
		return o
	}
	o += ",encrypt.iter-time=10"
	for i, name := range []string{"cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg"} {
		if w[i+1] != "" {
			o += ",encrypt." + name + "=" + w[i+1]
		}
	}
	return o
}

// encrypting is the same for us.
func encrypting(crypt string) *types.QCryptoBlockCreateOptions {
	w := strings.Split(crypt, "/")
	o := newKeys(w[0])
	if u, ok := o.U.(*types.QCryptoBlockCreateOptionsLUKS); ok {
		u.CipherAlg, u.CipherMode = (*types.QCryptoCipherAlgorithm)(&w[1]), (*types.QCryptoCipherMode)(&w[2])
		u.IvgenAlg, u.HashAlg = (*types.QCryptoIVGenAlgorithm)(&w[3]), (*types.QCryptoHashAlgorithm)(&w[5])
		if w[4] != "" {
			u.IvgenHashAlg = (*types.QCryptoHashAlgorithm)(&w[4])
		}
	}
	return o
}

// createEncrypted makes an image. qemu-img fails now and then: its measure of processor time is too
// coarse for it.
func (p qemuParty) createEncrypted(t *testing.T, dir string, args []string) {
	t.Helper()
	var out []byte
	for range 20 {
		c := exec.Command("qemu-img"+string(p), append([]string{args[0], "--object", "secret,id=k,data=key"}, args[1:]...)...)
		c.Dir = dir
		var err error
		if out, err = c.CombinedOutput(); err == nil {
			return
		}
		if !bytes.Contains(out, []byte("Unable to get accurate CPU usage")) {
			break
		}
	}
	t.Fatalf("%v: %s", args, out)
}

// TestExchangeEncrypted is TestExchange for encrypted images: each cluster size, with ciphers,
// kinds of tables, places of the data, versions, sizes and backing files by turns. There are few,
// as QEMU measures the processor for seconds to make one.
func TestExchangeEncrypted(t *testing.T) {
	crypts := strings.Fields(`luks/aes-256/xts/plain64//sha256 aes luks/aes-128/cbc/essiv/sha256/sha1
		luks/serpent-256/xts/plain64//sha512 luks/aes-192/xts/plain//sha256 luks/twofish-128/cbc/plain64//sha256
		luks/cast5-128/cbc/plain64//sha256`)
	sizes := []int{1 << 20, 1<<20 + 512, 3<<20 - 512}
	var l []exchange
	add := func(x exchange) {
		x.bits, x.size, x.crypt = 16, sizes[len(l)%len(sizes)], crypts[len(l)%len(crypts)]
		l = append(l, x)
	}
	for i, cs := range []uint64{512, 4 << 10, 64 << 10, 2 << 20} {
		add(exchange{cs: cs, v: "v3", back: i%2 == 1})
		add(exchange{cs: cs, v: []string{"v2", "v3"}[i%2], back: i%2 == 0})
		add(exchange{cs: max(cs, 16<<10), v: "v3", back: i%2 == 0, data: []string{"", "data"}[i%2], ext: i != 1})
	}
	testExchanges(t, l)
}
