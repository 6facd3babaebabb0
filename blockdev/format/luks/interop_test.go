package luks

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// tool finds a program of QEMU; the test is skipped where there is none.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip(err)
	}
	return path
}

// ciphers are combinations that QEMU can make images with: of all modes, generators and hashes, and
// all lengths of keys whose material is whole sectors, which it asserts.
func ciphers() (out []*types.BlockdevCreateOptionsLUKS) {
	for _, s := range strings.Fields(`
		aes-256/xts/plain64//sha256 aes-128/xts/plain//sha1 aes-192/xts/plain64//sha512 aes-256/xts/essiv/sha256/sha224
		aes-128/cbc/essiv/md5/sha384 aes-256/cbc/plain64//ripemd160 aes-256/ecb/plain64//md5 aes-128/ctr/plain64//sha256
		serpent-256/xts/plain64//sha256 serpent-128/cbc/essiv/sha256/sha256 serpent-192/xts/plain//sha256
		twofish-256/xts/plain64//sha256 twofish-128/cbc/plain//sha256 twofish-192/xts/essiv/sha256/sha256
		cast5-128/cbc/plain64//sha256 cast5-128/ctr/plain//sha1 cast5-128/ecb/essiv/md5/sha256`) {
		w := strings.Split(s, "/")
		o := options(128<<10 + 1000)
		o.CipherAlg, o.CipherMode = (*types.QCryptoCipherAlgorithm)(&w[0]), (*types.QCryptoCipherMode)(&w[1])
		o.IvgenAlg, o.HashAlg = (*types.QCryptoIVGenAlgorithm)(&w[2]), (*types.QCryptoHashAlgorithm)(&w[4])
		if w[3] != "" {
			o.IvgenHashAlg = (*types.QCryptoHashAlgorithm)(&w[3])
		}
		out = append(out, o)
	}
	return out
}

func describe(o *types.BlockdevCreateOptionsLUKS) string {
	s := fmt.Sprintf("cipher-alg=%s,cipher-mode=%s,ivgen-alg=%s,hash-alg=%s", *o.CipherAlg, *o.CipherMode, *o.IvgenAlg, *o.HashAlg)
	if o.IvgenHashAlg != nil {
		s += ",ivgen-hash-alg=" + string(*o.IvgenHashAlg)
	}
	return s
}

// qemuIO executes a command of qemu-io on an image.
func qemuIO(t *testing.T, program, name, command string) {
	t.Helper()
	out, err := exec.Command(program, "--object", "secret,id=k,data=one", "-c", command, "--image-opts",
		"driver=luks,key-secret=k,file.driver=file,file.filename="+name).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		t.Errorf("%s: %v\n%s", command, err, out)
	}
}

// QEMU reads and writes what is made here, and its writes are read here.
func TestQEMUReads(t *testing.T) {
	for _, program := range []string{"qemu-io", "qemu-io10"} {
		t.Run(program, func(t *testing.T) {
			path := tool(t, program)
			for _, o := range ciphers() {
				m := newImage(t, o)
				root, r := rooted(t, m)
				if err := root.WriteAt(r, blk.Buf(bytes.Repeat([]byte{0x5a}, 70000)), 512, 0); err != nil {
					t.Fatal(err)
				}
				name := filepath.Join(t.TempDir(), "disk")
				if err := os.WriteFile(name, m.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
				qemuIO(t, path, name, "read -P 0x5a 512 70000")
				qemuIO(t, path, name, "write -P 0x33 1024 66000")
				expect(t, describe(o), name, 1024, 66000, 0x33)
			}
		})
	}
}

// What QEMU makes is read here.
func TestReadsQEMUs(t *testing.T) {
	for _, program := range []string{"qemu-img", "qemu-img10"} {
		t.Run(program, func(t *testing.T) {
			path, io := tool(t, program), tool(t, "qemu-io")
			for i, o := range ciphers() {
				if i%4 != 0 { // it takes its time to make one
					continue
				}
				name := filepath.Join(t.TempDir(), "disk")
				made := false
				var out []byte
				// It fails now and then: its measure of processor time is too coarse for it.
				for range 20 {
					var err error
					out, err = exec.Command(path, "create", "-q", "--object", "secret,id=k,data=one", "-f", "luks", "-o",
						"key-secret=k,iter-time=10,"+describe(o), name, fmt.Sprint(o.Size)).CombinedOutput()
					if made = err == nil; made || !bytes.Contains(out, []byte("Unable to get accurate CPU usage")) {
						break
					}
				}
				if !made {
					t.Errorf("%s: %s", describe(o), out)
					continue
				}
				qemuIO(t, io, name, "write -P 0x77 512 100000")
				expect(t, describe(o), name, 512, 100000, 0x77)
			}
		})
	}
}

// expect opens an image and looks for a byte in a range.
func expect(t *testing.T, what, name string, off, n int64, want byte) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	root, r := rooted(t, drivertest.MemFileOf(data))
	got := make([]byte, n)
	if err := root.ReadAt(r, blk.Buf(got), off, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{want}, int(n))) {
		t.Errorf("%s: another content", what)
	}
}
