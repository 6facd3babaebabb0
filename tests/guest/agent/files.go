package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// files writes files of a file system, so that its journal, its caches and its own order of writes
// are there, too. What a file holds is a function of its number and generation.
type files struct {
	dir   string
	seed  uint64
	meter *meter
	wg    sync.WaitGroup
	gens  [maxFiles]uint64 // 0: the file is not there
}

const (
	maxFiles = 64
	maxPages = 64 // of a file
)

func newFiles(dir string, seed uint64, m *meter) *files {
	return &files{dir: dir, seed: seed, meter: m}
}

// run implements load.
func (f *files) run() { f.wg.Go(f.write) }

// end implements load. What is checked comes from the disk: nothing is cached of a file system that
// was mounted just now.
func (f *files) end() error {
	f.wg.Wait()
	dev, err := device(f.dir)
	if err != nil {
		return err
	}
	if err := syscall.Unmount(f.dir, 0); err != nil {
		return fmt.Errorf("unmounting: %w", err)
	}
	if err := mount(dev, f.dir); err != nil {
		return err
	}
	for i := range f.gens {
		if err := f.check(i); err != nil {
			f.meter.fault("%v", err)
		}
	}
	return nil
}

// device is what is mounted at dir.
func device(dir string) (dev string, err error) {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return "", err
	}
	for l := range bytes.Lines(b) {
		if w := bytes.Fields(l); len(w) > 1 && string(w[1]) == dir {
			return string(w[0]), nil
		}
	}
	return "", fmt.Errorf("nothing is mounted at %s", dir)
}

func (f *files) path(i int) string { return filepath.Join(f.dir, fmt.Sprintf("f%d", i)) }

// content is what a file of a generation holds.
func (f *files) content(i int, gen uint64) []byte {
	b := make([]byte, (1+(gen*7+uint64(i))%maxPages)*pageSize)
	for at := 0; at < len(b); at += pageSize {
		fill(b[at:at+pageSize], f.seed+1, uint64(i)<<32|uint64(at), gen)
	}
	return b
}

func (f *files) write() {
	rnd := rand.New(rand.NewPCG(f.seed, 77))
	for gen := uint64(1); !f.meter.stopped(); gen++ {
		i := rnd.IntN(maxFiles)
		switch x := rnd.IntN(20); {
		case x < 12:
			f.meter.count("file", func() error { return f.put(i, gen) })
		case x < 17:
			f.meter.count("check file", func() error { return f.check(i) })
		case x < 19:
			f.meter.count("remove file", func() error { return f.remove(i) })
		default:
			f.meter.count("trim", func() error { return trim(f.dir) })
		}
	}
}

// put replaces a file.
func (f *files) put(i int, gen uint64) error {
	w, err := os.OpenFile(f.path(i)+"~", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := w.Write(f.content(i, gen)); err != nil {
		return err
	}
	if err := w.Sync(); err != nil {
		return err
	}
	f.gens[i] = gen
	return os.Rename(w.Name(), f.path(i))
}

func (f *files) remove(i int) error {
	if f.gens[i] == 0 {
		return nil
	}
	f.gens[i] = 0
	return os.Remove(f.path(i))
}

// check reads a file past the cache.
func (f *files) check(i int) error {
	const dontNeed = 4
	r, err := os.Open(f.path(i))
	switch {
	case os.IsNotExist(err) && f.gens[i] == 0:
		return nil
	case err != nil:
		return err
	}
	defer r.Close()
	if f.gens[i] == 0 {
		return fmt.Errorf("file %d is there again", i)
	}
	_, _, _ = syscall.Syscall6(syscall.SYS_FADVISE64, r.Fd(), 0, 0, dontNeed, 0, 0)
	want := f.content(i, f.gens[i])
	got := make([]byte, len(want)+1)
	n, err := r.Read(got)
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:n], want) {
		return fmt.Errorf("file %d of generation %d differs, %d of %d bytes", i, f.gens[i], n, len(want))
	}
	return nil
}
