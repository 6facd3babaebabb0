package interop

import (
	"bytes"
	"errors"
	"os/exec"
	"testing"

	"qblockd/tests/daemon"
)

// bootSector is a guest in one sector: it has the BIOS write the sector that it was loaded from to
// sector 8 of its disk, and ends the machine with 0x10 if that worked and 0x20 if not.
var bootSector = func() []byte {
	code := []byte{
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0xbe, 0x18, 0x7c, // mov si, packet
		0xb8, 0x00, 0x43, // mov ax, 4300h: extended write
		0xcd, 0x13, // int 13h, the disk is in dl
		0xb0, 0x10, // mov al, 10h
		0x73, 0x02, // jnc done
		0xb0, 0x20, // mov al, 20h
		0xe6, 0xf4, // done: out 0f4h, al
		0xf4,       // hlt
		0xeb, 0xfd, // jmp the hlt
		0x90,
		// packet: 16 bytes, one sector, from 0000:7c00, to sector 8
		0x10, 0x00, 0x01, 0x00, 0x00, 0x7c, 0x00, 0x00, 0x08, 0, 0, 0, 0, 0, 0, 0,
	}
	b := make([]byte, 512)
	copy(b, code)
	b[510], b[511] = 0x55, 0xaa
	return b
}()

// TestGuest boots a machine from an export on a qcow2 chain, which writes to it.
func TestGuest(t *testing.T) {
	need(t, "qemu-system-x86_64", "qemu-img", "bash")
	dir := t.TempDir()
	sh(t, dir, "qemu-img create -q -f qcow2 base.qcow2 8M; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2")
	d := daemon.Start(t, dir, "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
		"--export", "nbd,id=e,node-name=disk,writable=on")
	c, err := d.DialNBD("disk")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt(bootSector, 0); err != nil {
		t.Fatal(err)
	}
	c.Close()

	vm := exec.Command("qemu-system-x86_64", "-machine", "pc,accel=kvm:tcg", "-nodefaults", "-display", "none", "-no-reboot",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=0x01",
		"-drive", "if=ide,format=raw,file="+d.URI("disk"))
	out, err := vm.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 0x10<<1|1 {
		t.Fatalf("the guest ended with %v\n%s", err, out)
	}
	if c, err = d.DialNBD("disk"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(bootSector))
	if err := c.ReadAt(got, 8*512); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bootSector) {
		t.Error("what the guest wrote is not there")
	}
	c.Close()
	d.Stop(t)
	sh(t, dir, "qemu-img check -q disk.qcow2")
}

// TestClients reads and writes an export with the clients that people use.
func TestClients(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "bash", "fio")
	dir := t.TempDir()
	chain(t, dir)
	sh(t, dir, "qemu-img convert -O raw t.qcow2 want.raw")
	d := daemon.Start(t, dir, "--blockdev", "qcow2,node-name=t,discard=unmap,file.driver=file,file.discard=unmap,file.filename=t.qcow2",
		"--export", "nbd,id=e,node-name=t,writable=on,description=a disk")
	uri := "'" + d.URI("t") + "'"
	for name, cmd := range map[string]string{
		"nbdinfo":          "nbdinfo --json " + uri + " | grep -q '\"description\": \"a disk\"'",
		"nbdinfo --map":    `test "$(nbdinfo --map ` + uri + ` | awk '{s+=$2} END {print s}')" = 67108864`,
		"nbdcopy":          "nbdcopy " + uri + " - | cmp - want.raw",
		"qemu-img compare": "qemu-img compare -f raw -F raw " + uri + " want.raw",
		"qemu-img convert": "qemu-img convert -f raw -O raw " + uri + " got.raw && cmp got.raw want.raw",
	} {
		t.Run(name, func(t *testing.T) { sh(t, dir, "set -o pipefail; %s", cmd) })
	}
	sh(t, dir, "qemu-io -f raw -c 'write -P 9 1M 64k' -c 'read -P 9 1M 64k' -c 'write -z -u 2M 1M' -c 'read -P 0 2M 1M' -c 'discard 4M 64k' -c flush %s", uri)
	if fio := sh(t, dir, "fio --enghelp"); bytes.Contains([]byte(fio), []byte("nbd")) {
		sh(t, dir, "fio --name=x --ioengine=nbd --uri=%s --rw=randrw --bs=4k --iodepth=16 --size=16M --io_size=8M --verify=crc32c --verify_fatal=1 --output=/dev/null", uri)
	} else {
		t.Log("SKIPPED: this fio has no nbd engine")
	}
	d.Stop(t)
	sh(t, dir, "qemu-img check -q t.qcow2")
}
