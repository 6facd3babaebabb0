// Package guest puts a real guest above an export of type vhost-user-blk: Debian's kernel in a
// virtual machine of QEMU, whose only process (see agent) formats the disk, mounts it, writes to
// it, and checks each byte that it reads. Below it the disk gets snapshots, moves to other images,
// grows, and the daemon is killed and started again; the guest must notice nothing but a pause.
//
//	kernel_test.go   the kernel, its drivers, and the initial file system with the agent
//	machine_test.go  a virtual machine, and the line to its agent
//	libvirt_test.go  a virtual machine that libvirt starts
//	host_test.go     the daemon and what is done to the disk
//	guest_test.go    the tests
//
// It needs qemu-system-x86_64, qemu-img, mke2fs and a kernel package, which tests/tools.sh unpacks
// without installing it; without one of them it is skipped. For libvirt it takes the package
// libvirt-daemon-system, and root.
package guest
