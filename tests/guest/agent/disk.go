package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// ioctl requests of block devices and file systems.
const (
	blkRereadPartitions = 0x125f
	blkDiscard          = 0x1277
	blkZeroOut          = 0x127f
	fiTrim              = 0xc0185879
)

// patience bounds each wait for the kernel.
const patience = 60 * time.Second

const sector = 512

// disk is a virtio disk with two partitions: a file system, and one without.
type disk struct{ path string }

func (d *disk) part(n int) string { return d.path + strconv.Itoa(n) }

// mounted is where the file system is.
func (d *disk) mounted() string { return "/disk" }

// size is the capacity that the kernel knows, in bytes.
func (d *disk) size() (int64, error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.path), "size"))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n * sector, err
}

// agreed tells what the driver uses: feature bits, and how many queues.
func (d *disk) agreed() (features, queues int64) {
	dir := filepath.Join("/sys/block", filepath.Base(d.path))
	b, _ := os.ReadFile(filepath.Join(dir, "device", "features"))
	for i, c := range strings.TrimSpace(string(b)) {
		if c == '1' && i < 63 {
			features |= 1 << i
		}
	}
	l, _ := os.ReadDir(filepath.Join(dir, "mq"))
	return features, int64(len(l))
}

// format makes two partitions, of 3/8 and of half of the disk, and a file system in the first.
func (d *disk) format() error {
	if err := await(func() bool { n, err := d.size(); return err == nil && n > 0 }); err != nil {
		return fmt.Errorf("%s: no disk: %w", d.path, err)
	}
	size, err := d.size()
	if err != nil {
		return err
	}
	if err := d.partition(size/sector/8*3, size/sector/2); err != nil {
		return fmt.Errorf("partitions: %w", err)
	}
	out, err := exec.Command("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard", d.part(1)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs: %w\n%s", err, out)
	}
	if err := os.MkdirAll(d.mounted(), 0o755); err != nil {
		return err
	}
	return mount(d.part(1), d.mounted())
}

func mount(dev, dir string) error {
	if err := syscall.Mount(dev, dir, "ext4", 0, "errors=remount-ro"); err != nil {
		return fmt.Errorf("mounting %s: %w", dev, err)
	}
	return nil
}

// partition writes a table with two partitions of so many sectors.
func (d *disk) partition(first, second int64) error {
	const begin = 2048
	table := make([]byte, sector)
	entry := func(i int, from, n int64) {
		e := table[446+16*i:]
		e[4] = 0x83
		binary.LittleEndian.PutUint32(e[8:], uint32(from))
		binary.LittleEndian.PutUint32(e[12:], uint32(n))
	}
	entry(0, begin, first)
	entry(1, begin+first, second)
	table[510], table[511] = 0x55, 0xaa
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(table, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := ioctl(int(f.Fd()), blkRereadPartitions, nil); err != nil {
		return err
	}
	return await(func() bool { _, err := os.Stat(d.part(2)); return err == nil })
}

// grown waits until the disk has that size, and writes and reads its last page.
func (d *disk) grown(size int64) error {
	if err := await(func() bool { n, err := d.size(); return err == nil && n == size }); err != nil {
		n, _ := d.size()
		return fmt.Errorf("the disk has %d bytes: %w", n, err)
	}
	f, err := os.OpenFile(d.path, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, got := pageMemory(pageSize), pageMemory(pageSize)
	fill(b, 1, 2, 3)
	if _, err := f.WriteAt(b, size-pageSize); err != nil {
		return err
	}
	if _, err := f.ReadAt(got, size-pageSize); err != nil {
		return err
	}
	if !bytes.Equal(b, got) {
		return fmt.Errorf("the last page differs from what was written")
	}
	return nil
}

// zeroOut has the kernel make a range read as zeroes; discard drops it.
func zeroOut(f *os.File, off, n int64) error { return onRange(f, blkZeroOut, off, n) }
func discard(f *os.File, off, n int64) error { return onRange(f, blkDiscard, off, n) }

func onRange(f *os.File, req uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	return ioctl(int(f.Fd()), req, unsafe.Pointer(&r))
}

// trim discards what a file system does not use.
func trim(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	r := [3]uint64{0, 1 << 62, 0}
	return ioctl(int(f.Fd()), fiTrim, unsafe.Pointer(&r))
}

// await looks for a condition of the kernel that tells nobody when it comes true.
func await(f func() bool) error {
	for end := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("not within %v", patience)
		}
	}
	return nil
}
