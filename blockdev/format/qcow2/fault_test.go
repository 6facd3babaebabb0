package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// scenario does one of everything; it goes on after errors, which it returns joined, and
// keeps disk up to date for what succeeded.
func scenario(s *image, disk []byte, bad []bool) error {
	var errs []error
	write := func(off, n int, v byte, f blk.Flags) {
		b := bytes.Repeat([]byte{v}, n)
		err := s.WriteAt(req(), blk.Buf(b), int64(off), f)
		errs = append(errs, err)
		for i := off; i < off+n; i++ {
			disk[i] = v
			bad[i/512] = err != nil
		}
	}
	cs := int(s.cs)
	write(0, 3*cs, 1, 0)
	write(cs/2, cs, 2, 0)
	errs = append(errs, s.Flush(req()))
	if err := s.Discard(req(), int64(cs), int64(cs)); err == nil {
		clear(disk[cs : 2*cs])
		for i := cs / 512; i < 2*cs/512; i++ {
			bad[i] = false
		}
	} else {
		errs = append(errs, err)
		for i := cs / 512; i < 2*cs/512; i++ {
			bad[i] = true
		}
	}
	errs = append(errs, s.Flush(req()))
	for i := range 40 {
		write((8+3*i)*cs, cs+cs/2, byte(10+i), 0)
	}
	how := blk.Compressed
	if s.geo.External || s.seal != nil {
		how = 0 // nothing is compressed there
	}
	write(4*cs, cs, 5, how)
	write(5*cs, cs, 6, how)
	errs = append(errs, s.Flush(req()))
	write(4*cs+cs/2, cs/2, 7, 0)
	if err := s.Resize(req(), int64(len(disk))*2, blk.PreallocOff); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, s.Flush(req()))
	if !s.geo.External {
		// What is shared moves: the L1 table that the header refers to has to hear of it.
		_, err := s.CreateSnapshot(req(), "s", time.Unix(0, 0), 0)
		errs = append(errs, err)
	}
	write(0, cs, 8, 0)
	errs = append(errs, s.Flush(req()))
	return errors.Join(errs...)
}

// TestEachFailure lets the i-th call of the file fail, for all i: no corruption follows,
// leaks are allowed, and what was written successfully is there.
func TestEachFailure(t *testing.T) {
	for _, sh := range []shape{
		{cs: 1024, bits: 64, v: "v3"}, {cs: 4096, bits: 16, v: "v3"}, {cs: 1024, bits: 16, v: "v3", lazy: true},
		{cs: 16384, bits: 16, v: "v3", ext: true},
		{cs: 1024, bits: 16, v: "v3", data: "data"}, {cs: 4096, bits: 1, v: "v3", data: "raw"},
		{cs: 16384, bits: 16, v: "v3", ext: true, data: "data"},
		{cs: 4096, bits: 16, v: "v3", crypt: "luks"}, {cs: 4096, bits: 16, v: "v3", data: "raw", crypt: "aes"},
	} {
		for _, external := range []bool{false, true} {
			if external && sh.data == "" {
				continue
			}
			t.Run(fmt.Sprintf("%+v,external=%v", sh, external), func(t *testing.T) {
				for i := 0; ; i++ {
					if !failOnce(t, sh, external, i) {
						t.Logf("%d calls", i)
						break
					}
					if testing.Short() {
						i += 6
					}
				}
			})
		}
	}
}

// failOnce lets call i of the file fail or, with external, of the one that has the data.
func failOnce(t *testing.T, sh shape, external bool, i int) (failed bool) {
	size := int(sh.cs) * 150
	o := sh.options(uint64(size))
	img := mustCreate(t, o)
	f := drivertest.NewFault(img)
	whole, c := config{}, config{file: mem{f}, unmap: true}
	if o.Data != nil {
		whole.external, c.external = mem{o.Data}, mem{o.Data}
	}
	if external {
		f = drivertest.NewFault(o.Data)
		c.file, c.external = mem{img}, mem{f}
	}
	s := mustOpen(t, c.file, c)
	setCaches(s, 4, 4)
	disk, bad := make([]byte, size), make([]bool, size/512)
	f.FailAt(i, syscall.EIO)
	err := scenario(s, disk, bad)
	if f.Failed() == 0 {
		if err != nil {
			t.Fatal(err)
		}
		f.Clear()
		mustClose(t, s)
		return false
	}
	if err != nil && !errors.Is(err, syscall.EIO) {
		t.Fatalf("call %d: %v", i, err)
	}
	f.Clear()
	sound(t, s, true)
	look := func() {
		t.Helper()
		got := make([]byte, size)
		if err := s.ReadAt(req(), blk.Buf(got), 0, 0); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
		for k := range bad {
			if !bad[k] && !bytes.Equal(got[k*512:k*512+512], disk[k*512:k*512+512]) {
				t.Fatalf("call %d: sector %d differs: %d instead of %d", i, k, got[k*512], disk[k*512])
			}
		}
	}
	look()
	live := s.size.Load()
	mustClose(t, s)
	s = mustOpen(t, mem{img}, whole)
	if n := s.size.Load(); n != live {
		t.Fatalf("call %d: the size is %d, and %d once the image is opened again", i, live, n)
	}
	look()
	sound(t, s, true)
	mustClose(t, s)
	return true
}
