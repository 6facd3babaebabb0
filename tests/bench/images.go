package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"slices"
)

// Every page of 4 KiB of an image begins with its offset, disguised; so do the pages that loads
// write.
const (
	markPage = 4096
	markKey  = 0xc0ffee5ca1ab1e5
)

// pattern returns n bytes to be marked.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*11 + i>>8 + 3)
	}
	return b
}

// mark makes b the data at off.
func mark(b []byte, off int64) {
	for i := 0; i+8 <= len(b); i += markPage {
		binary.LittleEndian.PutUint64(b[i:], uint64(off+int64(i))^markKey)
	}
}

// marked tells whether b is the data at off, a multiple of a page.
func marked(b []byte, off int64) error {
	for i := 0; i+8 <= len(b); i += markPage {
		if v := binary.LittleEndian.Uint64(b[i:]) ^ markKey; v != uint64(off+int64(i)) {
			return fmt.Errorf("wrong data at %d: mark %#x", off+int64(i), v)
		}
	}
	return nil
}

// fillRaw makes a raw image without holes.
func fillRaw(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := pattern(1 << 20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		mark(buf, off)
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	// What is measured is not to compete with writing this back.
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

// qemuImg runs qemu-img.
func (b *bench) qemuImg(args ...string) error {
	if slices.Contains(b.absent, "qemu-img") {
		return fmt.Errorf("%w: it needs qemu-img", errSkip)
	}
	if out, err := exec.CommandContext(b.ctx, "qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", args[0], err, out)
	}
	return nil
}

// newQcow2 makes an empty image.
func (b *bench) newQcow2(path string, size int64) error {
	return b.qemuImg("create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
}

// withBacking is the image with the name of a backing file in its header (qcow2.txt:
// backing_file_offset, _size), far behind the header's extensions and before the first cluster that
// is used.
func withBacking(image []byte, name string) []byte {
	const at = 4096
	b := bytes.Clone(image)
	binary.BigEndian.PutUint64(b[8:], at)
	binary.BigEndian.PutUint32(b[16:], uint32(len(name)))
	copy(b[at:], name)
	return b
}
