package guest

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"testing"
)

// domain is a guest as libvirt describes it, with a disk of type vhostuser. Source: libvirt's
// formatdomain.
const domain = `<domain type='%s'>
  <name>guest</name>
  <memory unit='MiB'>%d</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>%s</kernel>
    <initrd>%s</initrd>
    <cmdline>%s</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>%s</emulator>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw' queues='%d'/>
      <source type='unix' path='%s'><reconnect enabled='yes' timeout='1'/></source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='%s'/><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path='%s'/><target port='1'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
`

// settings let the guest run as whoever runs the tests, wherever that is.
const settings = `user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
`

// TestLibvirt has libvirt start a guest above an export: what it asks of a vhost-user disk is
// there, and the disk works, also across the death of the daemon.
func TestLibvirt(t *testing.T) {
	_, err := exec.LookPath("virt-qemu-run")
	if _, e := user.Lookup("libvirt-qemu"); cmp.Or(err, e) != nil || os.Getuid() != 0 {
		t.Skip("SKIPPED: libvirt-daemon-system is not installed, or not for this user")
	}
	d := device{queues: 2}
	r := prepare(t, rawDisk, d)
	r.m = launch(t, func(m *machine, line string) *exec.Cmd {
		root := filepath.Join(t.TempDir(), "root")
		if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		kind := "qemu"
		if accel() == "kvm" {
			kind = "kvm"
		}
		config := fmt.Sprintf(domain, kind, memory, r.kernel.image, r.initrd, cmdline, r.emulator, d.queues, r.h.socket(),
			m.console, line)
		file := filepath.Join(root, "domain.xml")
		for path, text := range map[string]string{file: config, filepath.Join(root, "etc", "qemu.conf"): settings} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return exec.Command("virt-qemu-run", "-r", root, file)
	})
	r.m.do(command{Do: "format", Device: "/dev/vda"})
	r.m.do(command{Do: "load", Seed: *flagSeed})
	r.step("load", func() {}, true)
	r.step("kill", r.h.kill, false)
	r.check()
	r.m.end() // virt-qemu-run outlives a machine that was switched off
	r.h.stop()
}
