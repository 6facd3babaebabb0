package vanish

import (
	"bytes"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// shared is memory of n bytes and its file.
func shared(t *testing.T, n int) (b []byte, fd int) {
	t.Helper()
	fd, err := unix.MemfdCreate("shared", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		t.Fatal(err)
	}
	b, err = unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b, fd
}

func watch(t *testing.T, b []byte) *Area {
	t.Helper()
	if runtime.GOARCH != "amd64" || runtime.GOOS != "linux" {
		t.Skip("there is no handler here")
	}
	a, err := Watch(b, 4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.End)
	return a
}

// TestVanish: pages that have gone are zeroes in all goroutines, also in the middle of a copy, and
// the others stay.
func TestVanish(t *testing.T) {
	const n = 1 << 20
	b, fd := shared(t, n)
	a := watch(t, b)
	for i := range b {
		b[i] = byte(i>>12) + 1
	}
	if a.Gone() {
		t.Fatal("gone before")
	}
	if err := unix.Ftruncate(fd, n/2); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			c := make([]byte, n)
			copy(c, b)
			for i := range c {
				want := byte(i>>12) + 1
				if i >= n/2 {
					want = 0
				}
				if c[i] != want {
					t.Errorf("goroutine %d: byte %d is %d, want %d", g, i, c[i], want)
					return
				}
			}
		})
	}
	wg.Wait()
	if !a.Gone() {
		t.Error("not gone")
	}
	copy(b[n/2:], "writes go nowhere")
	if !bytes.HasPrefix(b[n/2:], []byte("writes go nowhere")) {
		t.Error("the page is not ours")
	}
}

// TestRace: memory goes while goroutines use it, collect garbage and take other signals.
func TestRace(t *testing.T) {
	const n, rounds = 64 << 12, 50
	for range rounds {
		b, fd := shared(t, n)
		a := watch(t, b)
		var wg sync.WaitGroup
		start := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				<-start
				for range 20 {
					for i := 0; i < n; i += 512 {
						b[i]++
					}
				}
				runtime.GC()
			})
		}
		wg.Go(func() {
			<-start
			if err := unix.Ftruncate(fd, 0); err != nil {
				t.Error(err)
			}
		})
		close(start)
		wg.Wait()
		b[n-1]++
		if !a.Gone() {
			t.Fatal("not gone")
		}
	}
}

// TestOthers: faults elsewhere are the runtime's, before and after the end of a watch.
func TestOthers(t *testing.T) {
	b, _ := shared(t, 4096)
	a := watch(t, b)
	other, fd := shared(t, 4096)
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	fault := func() (err any) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() { err = recover() }()
		other[0] = 1
		return nil
	}
	if fault() == nil {
		t.Error("a page that nobody watches is replaced")
	}
	w, err := Watch(other, 4096)
	if err != nil {
		t.Fatal(err)
	}
	w.End()
	if fault() == nil {
		t.Error("a page that nobody watches any more is replaced")
	}
	if w, err = Watch(other, 4096); err != nil {
		t.Fatal(err)
	}
	defer w.End()
	if err := fault(); err != nil || !w.Gone() || a.Gone() {
		t.Error(err, w.Gone(), a.Gone())
	}
}
