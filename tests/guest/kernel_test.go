package guest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kernelDirs are where a kernel package may have been unpacked.
var kernelDirs = []string{os.Getenv("QBLOCKD_GUEST_KERNEL"), "/var/cache/qblockd/guest", "/"}

// kernel is a kernel with its drivers.
type kernel struct {
	image   string
	modules string // folder
}

// findKernel looks for a kernel that can be read.
func findKernel(t *testing.T) kernel {
	t.Helper()
	for _, dir := range kernelDirs {
		if dir == "" {
			continue
		}
		images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
		for _, image := range images {
			version := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
			for _, lib := range []string{"lib", "usr/lib"} {
				k := kernel{image, filepath.Join(dir, lib, "modules", version, "kernel")}
				if f, err := os.Open(image); err == nil && k.find("virtio_blk") != "" {
					f.Close()
					return k
				}
			}
		}
	}
	t.Skip("SKIPPED: no kernel for a guest; tests/tools.sh gets one")
	return kernel{}
}

// find is the file of a driver; "" if the kernel has it built in, or not at all.
func (k kernel) find(name string) (path string) {
	_ = filepath.WalkDir(k.modules, func(p string, d os.DirEntry, err error) error {
		base, _, _ := strings.Cut(filepath.Base(p), ".ko")
		if err == nil && !d.IsDir() && strings.ReplaceAll(base, "-", "_") == name {
			path = p
			return filepath.SkipAll
		}
		return nil
	})
	return path
}

// withNeeds appends the files of a driver and before it those it needs.
func (k kernel) withNeeds(files []string, name string) ([]string, error) {
	path := k.find(name)
	if path == "" {
		return files, nil
	}
	needs, err := moduleNeeds(path)
	if err != nil {
		return nil, err
	}
	for _, n := range needs {
		if files, err = k.withNeeds(files, n); err != nil {
			return nil, err
		}
	}
	for _, f := range files {
		if f == path {
			return files, nil
		}
	}
	return append(files, path), nil
}

// moduleNeeds are the names of the modules that one depends on.
func moduleNeeds(path string) ([]string, error) {
	if !strings.HasSuffix(path, ".ko") {
		out, err := exec.Command("modinfo", "-F", "depends", path).Output()
		return strings.FieldsFunc(string(out), isComma), err
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("%s: no module", path)
	}
	b, err := s.Data()
	if err != nil {
		return nil, err
	}
	for l := range bytes.SplitSeq(b, []byte{0}) {
		if n, ok := bytes.CutPrefix(l, []byte("depends=")); ok {
			return strings.FieldsFunc(string(n), isComma), nil
		}
	}
	return nil, nil
}

func isComma(r rune) bool { return r == ',' || r == '\n' }

// initrd writes the file system that the guest starts from: the agent, the drivers, and mke2fs with
// its libraries.
func initrd(t *testing.T, k kernel) (path string) {
	t.Helper()
	var a archive
	a.dir("modules")
	a.dir("tmp")
	agent := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-o", agent, "-ldflags", "-s -w", "qblockd/tests/guest/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("agent: %v\n%s", err, out)
	}
	a.copy(t, "init", agent)
	var modules []string
	for _, name := range []string{"virtio_pci", "virtio_blk", "ext4"} {
		var err error
		if modules, err = k.withNeeds(modules, name); err != nil {
			t.Fatal(err)
		}
	}
	for i, m := range modules {
		a.copy(t, fmt.Sprintf("modules/%02d-%s", i, filepath.Base(m)), m)
	}
	a.program(t, "sbin/mke2fs", "mke2fs")
	path = filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(path, a.bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// program adds an executable and the libraries that it is linked with.
func (a *archive) program(t *testing.T, to, name string) {
	t.Helper()
	exe, err := exec.LookPath(name)
	if err != nil {
		if exe = "/sbin/" + name; !exists(exe) {
			t.Skipf("SKIPPED: %s is not installed", name)
		}
	}
	a.copy(t, to, exe)
	out, err := exec.Command("ldd", exe).Output()
	if err != nil {
		t.Fatalf("ldd %s: %v", exe, err)
	}
	for l := range strings.Lines(string(out)) {
		for _, w := range strings.Fields(l) {
			if strings.HasPrefix(w, "/") && exists(w) {
				a.copy(t, strings.TrimPrefix(w, "/"), w)
			}
		}
	}
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// archive is a cpio archive in the format newc, which the kernel unpacks. Source: the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst.
type archive struct {
	out  bytes.Buffer
	dirs map[string]bool
	next int // inode
}

// dir adds a folder, after those that it is in.
func (a *archive) dir(name string) {
	if name == "." || a.dirs[name] {
		return
	}
	a.dir(filepath.Dir(name))
	if a.dirs == nil {
		a.dirs = map[string]bool{}
	}
	a.dirs[name] = true
	a.entry(name, 0o040755, nil)
}

// copy adds a file as an executable one.
func (a *archive) copy(t *testing.T, name, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	a.dir(filepath.Dir(name))
	a.entry(name, 0o100755, b)
}

func (a *archive) entry(name string, mode int, data []byte) {
	a.next++
	fmt.Fprintf(&a.out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.next, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.out.WriteString(name)
	a.out.WriteByte(0)
	a.pad()
	a.out.Write(data)
	a.pad()
}

// pad fills up to a multiple of four bytes.
func (a *archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}

// bytes ends the archive.
func (a *archive) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.out.Bytes()
}
