package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// fileLoad is a workload on a file: qd threads with one request each.
type fileLoad struct {
	name   string
	bs, qd int
	write  bool
	random bool
	cached bool // through the page cache
}

var fileLoads = []fileLoad{
	{name: "read 1 MiB", bs: mib, qd: 1},
	{name: "read 1 MiB qd4", bs: mib, qd: 4},
	{name: "read 1 MiB, cached", bs: mib, qd: 1, cached: true},
	{name: "randread 4 KiB", bs: 4096, qd: 1, random: true},
	{name: "randread 4 KiB qd16", bs: 4096, qd: 16, random: true},
	{name: "randread 4 KiB, cached", bs: 4096, qd: 1, random: true, cached: true},
	{name: "write 1 MiB", bs: mib, qd: 1, write: true},
	{name: "write 1 MiB, cached", bs: mib, qd: 1, write: true, cached: true},
	{name: "randwrite 4 KiB", bs: 4096, qd: 1, write: true, random: true},
	{name: "randwrite 4 KiB qd16", bs: 4096, qd: 16, write: true, random: true},
}

// fuseLoads: both daemons show one image as a file. Without "cached" the file is opened with
// O_DIRECT: then what is measured is the daemons, not the page cache of the file.
func fuseLoads(b *bench, format, where string) *group {
	var image string
	points := map[string]string{}
	up := map[string]*proc{}
	g := &group{name: "fuse " + format + " " + where, sides: []string{us, qsd, qsd10}}
	g.ready = func() error {
		if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
			return fmt.Errorf("%w: %w", errSkip, err)
		} else {
			f.Close()
		}
		dir, err := b.folder(where)
		if err != nil {
			return err
		}
		image = filepath.Join(dir, "fuse."+format)
		raw := filepath.Join(dir, "fuse.raw")
		if err := fillRaw(raw, b.size); err != nil || format == "raw" {
			return err
		}
		defer os.Remove(raw)
		if out, err := exec.Command("qemu-img", "convert", "-O", format, raw, image).CombinedOutput(); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	}
	g.setUp = func(side string) error {
		points[side] = filepath.Join(b.shm, side+".mp")
		if err := os.WriteFile(points[side], nil, 0o600); err != nil {
			return err
		}
		p, err := b.daemon(side, 0, "--blockdev", "driver=file,node-name=f,locking=off,filename="+image,
			"--blockdev", "driver="+format+",node-name=n,file=f",
			"--export", "fuse,id=e,node-name=n,writable=on,mountpoint="+points[side])
		up[side] = p
		return err
	}
	g.down = func() { os.Remove(image) }
	for _, l := range fileLoads {
		unit := "MB/s"
		if l.bs < 64<<10 {
			unit = "IOPS"
		}
		g.loads = append(g.loads, load{name: l.name,
			metrics: []metric{{l.name, unit, false}, {l.name + ", processor time", unit, false}},
			run:     func(side string) ([]float64, error) { return l.run(b, points[side], up[side]) }})
	}
	return g
}

// run measures what goes through in a second, and for a second of the server's processor time.
func (l *fileLoad) run(b *bench, path string, p *proc) ([]float64, error) {
	flags := os.O_RDWR
	if !l.cached {
		flags |= syscall.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	before, err := p.cpu()
	if err != nil {
		return nil, err
	}
	var stop atomic.Bool
	var done atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, l.qd)
	begin := time.Now()
	timer := time.AfterFunc(time.Duration(b.secs*float64(time.Second)), func() { stop.Store(true) })
	defer timer.Stop()
	for k := range l.qd {
		all.Go(func() { errs[k] = l.thread(f, b.size, k, &stop, &done) })
	}
	all.Wait()
	took := time.Since(begin).Seconds()
	after, err := p.cpu()
	n := float64(done.Load())
	if l.bs >= 64<<10 {
		n *= float64(l.bs) / 1e6
	}
	return []float64{n / took, n / max(after-before, 0.01)}, errors.Join(append(errs, err)...)
}

// thread keeps one request under way; those of several threads take turns where they are not
// random.
func (l *fileLoad) thread(f *os.File, size int64, k int, stop *atomic.Bool, done *atomic.Int64) error {
	buf, err := syscall.Mmap(-1, 0, l.bs, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer syscall.Munmap(buf)
	rng := rand.New(rand.NewPCG(uint64(k), 7))
	blocks := size / int64(l.bs)
	for i := int64(k); !stop.Load(); i += int64(l.qd) {
		at := i % blocks
		if l.random {
			at = rng.Int64N(blocks)
		}
		if l.write {
			_, err = f.WriteAt(buf, at*int64(l.bs))
		} else if _, err = f.ReadAt(buf, at*int64(l.bs)); err == io.EOF {
			err = nil
		}
		if err != nil {
			return err
		}
		done.Add(1)
	}
	return nil
}
