package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/raw"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// TestSuite: the contract of drivers, alone and below raw.
func TestSuite(t *testing.T) {
	drivertest.Run(t, drivertest.Config{
		Layers: []drivertest.Layer{{Name: "raw", Def: raw.Def, Options: &types.BlockdevOptionsRaw{}}},
		Noise:  true,
		Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
			m := newImage(t, options(size))
			root, r := rooted(t, m)
			if err := root.Zero(r, 0, size, 0); err != nil {
				t.Fatal(err)
			}
			n, err := openIn(t, g, m, ptr("one"), ro)
			if err != nil {
				t.Fatal(err)
			}
			return n
		},
	})
}

// Nothing of what is written can be found in the file, and sectors that are alike do not look
// alike.
func TestCiphertext(t *testing.T) {
	m := newImage(t, options(1<<20))
	root, r := rooted(t, m)
	plain := bytes.Repeat([]byte("plain text of 16"), 4096)
	if err := root.WriteAt(r, blk.Buf(plain), 512, 0); err != nil {
		t.Fatal(err)
	}
	file := m.Bytes()
	if bytes.Contains(file, plain[:16]) {
		t.Error("plain text is in the file")
	}
	at := len(file) - 1<<20 + 512
	if bytes.Equal(file[at:at+16], file[at+512:at+528]) {
		t.Error("sectors that are alike look alike")
	}
}

// Buffers of a client are not changed by its writes, however they are cut.
func TestVectors(t *testing.T) {
	m := newImage(t, options(4<<20))
	root, r := rooted(t, m)
	want := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{}).Read(want)
	for _, cuts := range [][]int{{}, {512, 1024}, {100, 70000}, {1, 2 << 20}} {
		data := bytes.Clone(want)
		cut := func(b []byte) (out [][]byte) {
			last := 0
			for _, c := range cuts {
				out, last = append(out, b[last:c]), c
			}
			return append(out, b[last:])
		}
		if err := root.WriteAt(r, blk.Bufs(cut(data)), 1024, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(data, want) {
			t.Errorf("cut at %v: a write changed its data", cuts)
		}
		got := make([]byte, len(want))
		if err := root.ReadAt(r, blk.Bufs(cut(got)), 1024, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("cut at %v: read something else", cuts)
		}
	}
}

// Texts of images that are not opened are QEMU's, and none has a password.
func TestOpenErrors(t *testing.T) {
	good := newImage(t, options(1<<20))
	far := good.Clone()
	far.Poke(104, []byte{0xff, 0xff, 0xff, 0xff})
	for _, c := range []struct {
		file *drivertest.MemFile
		key  *string
		want string
	}{
		{good, nil, "Parameter 'key-secret' is required for cipher"},
		{good, ptr("none"), "No secret with id 'none'"},
		{good, ptr("other"), "Object with id 'other' is not a secret"},
		{good, ptr("binary"), "Data from secret binary is not valid UTF-8"},
		{good, ptr("nul"), "Data from secret nul is not valid UTF-8"},
		{good, ptr("two"), "Invalid password, cannot unlock any keyslot"},
		{drivertest.NewMemFile(100), ptr("one"), "Volume is not in LUKS format"},
		{far, ptr("one"), "Could not refresh total sector count: Input/output error"},
	} {
		g := drivertest.NewGraph(t)
		if _, err := openIn(t, g, c.file.Clone(), c.key, false); err == nil || err.Error() != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
}

// Sizes need not be whole sectors: the last one is whole all the same.
func TestSizes(t *testing.T) {
	for size, want := range map[int64]int64{0: 0, 1: 512, 511: 512, 512: 512, 1000: 1024} {
		root, r := rooted(t, newImage(t, options(size)))
		if root.Size() != want {
			t.Errorf("%d bytes make a disk of %d, want %d", size, root.Size(), want)
		}
		b := bytes.Repeat([]byte{7}, int(want))
		if err := root.WriteAt(r, blk.Buf(b), 0, 0); err != nil {
			t.Error(err)
		}
		got := make([]byte, want)
		if err := root.ReadAt(r, blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, b) {
			t.Errorf("size %d: %v", size, err)
		}
	}
}

// The size changes with that of the file.
func TestResize(t *testing.T) {
	root, r := rooted(t, newImage(t, options(1<<20)))
	want := bytes.Repeat([]byte{9}, 4096)
	if err := root.WriteAt(r, blk.Buf(want), 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{2 << 20, 4096, 1 << 20} {
		if err := root.Resize(r.Ctx, size, true, blk.PreallocOff); err != nil || root.Size() != size {
			t.Errorf("resize to %d made %d: %v", size, root.Size(), err)
		}
	}
	got := make([]byte, 4096)
	if err := root.ReadAt(r, blk.Buf(got), 0, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was kept is something else: %v", err)
	}
}

// What cannot be made is refused before the file is touched.
func TestCreateErrors(t *testing.T) {
	for want, change := range map[string]func(o *types.BlockdevCreateOptionsLUKS){
		"Parameter 'key-secret' is required for cipher": func(o *types.BlockdevCreateOptionsLUKS) { o.KeySecret = nil },
		"No secret with id 'x'":                         func(o *types.BlockdevCreateOptionsLUKS) { o.KeySecret = ptr("x") },
		"The requested file size is too large":          func(o *types.BlockdevCreateOptionsLUKS) { o.Size = 1<<64 - 1 },
		"Unsupported cipher mode xts": func(o *types.BlockdevCreateOptionsLUKS) {
			o.CipherAlg = ptr(types.QCryptoCipherAlgorithmCast5128)
		},
		"No AES cipher with key size 20 available": func(o *types.BlockdevCreateOptionsLUKS) {
			o.IvgenAlg, o.IvgenHashAlg = ptr(types.QCryptoIVGenAlgorithmEssiv), ptr(types.QCryptoHashAlgorithmSha1)
		},
	} {
		o, m := options(1<<20), drivertest.NewMemFile(512)
		change(o)
		if err := makeIn(t, m, o); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		if !bytes.Equal(m.Bytes(), make([]byte, 512)) {
			t.Errorf("%s: the file was changed", want)
		}
	}
}

// Each I/O of making, opening and using an image fails once: the error is told, and what is on disk
// is no image, or opens.
func TestFaults(t *testing.T) {
	for i := 0; ; i++ {
		m := drivertest.NewMemFile(0)
		f := drivertest.NewFault(m)
		f.FailAt(i, syscall.ENOSPC)
		err := scenario(t, f)
		if f.Failed() == 0 {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("call %d fails: %v", i, err)
		}
		g := drivertest.NewGraph(t)
		_, err = openIn(t, g, m, ptr("one"), false)
		if err != nil && err.Error() != "Volume is not in LUKS format" {
			t.Errorf("call %d fails: then %v", i, err)
		}
	}
}

func scenario(t *testing.T, file graph.Driver) (err error) {
	if err := makeIn(t, file, options(64<<10)); err != nil {
		return err
	}
	g := graph.New(&drivertest.Sink{})
	defer func() { err = errors.Join(err, g.Close(context.Background())) }()
	n, err := openIn(t, g, file, ptr("one"), false)
	if err != nil {
		return err
	}
	tx := g.Begin(context.Background())
	defer tx.Abort()
	root, err := tx.AttachRoot(graph.RootSpec{EdgeName: "root", Claim: anything}, n)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.CloseRoot(context.Background(), root)) }()
	r, err := root.Begin(context.Background())
	if err != nil {
		return err
	}
	defer root.End(r)
	b := make([]byte, 5000)
	for _, f := range []func() error{
		func() error { return root.WriteAt(r, blk.Buf(b), 100, blk.FUA) },
		func() error { return root.ReadAt(r, blk.Buf(b), 77, 0) },
		func() error { return root.Zero(r, 512, 4096, 0) },
		func() error { return root.Flush(r) },
		func() error { return root.Resize(r.Ctx, 128<<10, true, blk.PreallocOff) },
	} {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// Requests allocate nothing.
func TestAllocs(t *testing.T) {
	root, r := rooted(t, newImage(t, options(4<<20)))
	for _, size := range []int{512, 4096, 64 << 10, 1 << 20} {
		b := make([]byte, size)
		for name, f := range map[string]func() error{
			"read":  func() error { return root.ReadAt(r, blk.Buf(b), 512, 0) },
			"write": func() error { return root.WriteAt(r, blk.Buf(b), 512, 0) },
		} {
			if raceEnabled {
				continue
			}
			if n := testing.AllocsPerRun(50, func() {
				if err := f(); err != nil {
					t.Fatal(err)
				}
			}); n > 0.5 {
				t.Errorf("%s of %d bytes: %v allocations", name, size, n)
			}
		}
	}
}

// What queries show.
func TestInfo(t *testing.T) {
	o := options(1 << 20)
	o.CipherMode, o.IvgenAlg = ptr(types.QCryptoCipherModeCbc), ptr(types.QCryptoIVGenAlgorithmEssiv)
	root, _ := rooted(t, newImage(t, o))
	var info types.ImageInfo
	root.Edge().Node().Driver().(graph.Informer).ImageInfo(&info)
	got := info.FormatSpecific.U.(*types.ImageInfoSpecificLUKSWrapper).Data
	s := fmt.Sprintln(got.CipherAlg, got.CipherMode, got.IvgenAlg, *got.IvgenHashAlg, got.HashAlg,
		got.PayloadOffset, got.MasterKeyIters)
	if s != "aes-256 cbc essiv sha256 sha256 1052672 1000\n" {
		t.Error(s)
	}
	for i, s := range got.Slots {
		if s.Active != (i == 0) || (s.Iters != nil) != s.Active || s.KeyOffset != 4096+int64(i)*131072 {
			t.Errorf("slot %d: %+v", i, s)
		}
	}
	if !*info.Encrypted || len(got.Uuid) != 36 {
		t.Errorf("%+v", got)
	}
}

// A write that must not wait does all of its work or none, also one that takes several pieces.
func TestNoWait(t *testing.T) {
	m := newImage(t, options(4<<20))
	root, r := rooted(t, m)
	before := bytes.Clone(m.Bytes())
	r.NoWait = true
	defer func() { r.NoWait = false }()
	err := root.WriteAt(r, blk.Buf(make([]byte, 2<<20)), 0, 0)
	if !errors.Is(err, blk.ErrWouldBlock) || !bytes.Equal(before, m.Bytes()) {
		t.Errorf("a write of two pieces: %v", err)
	}
	if err := root.WriteAt(r, blk.Buf(make([]byte, 1<<20)), 0, 0); err != nil {
		t.Errorf("a write of one piece: %v", err)
	}
}
