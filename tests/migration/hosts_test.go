package migration

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// hosts are the two machines: network namespaces with a cable between them, or, where those cannot
// be had, twice this one.
type hosts struct {
	t              testing.TB
	source, target string // names of namespaces, "" without
	addr           string // of the target, as the source sees it
}

const cable = "wire" // the interface at either end

// newHosts makes the machines.
func newHosts(t testing.TB) *hosts {
	t.Helper()
	h := &hosts{t: t, addr: "127.0.0.1"}
	if _, err := exec.LookPath("ip"); err != nil || os.Getuid() != 0 {
		t.Log("without network namespaces: they need root, and ip")
		return h
	}
	s, d := fmt.Sprintf("qb%ds", os.Getpid()), fmt.Sprintf("qb%dt", os.Getpid())
	t.Cleanup(func() { // takes the cable along
		_ = exec.Command("ip", "netns", "del", s).Run()
		_ = exec.Command("ip", "netns", "del", d).Run()
	})
	for _, args := range [][]string{
		{"netns", "add", s}, {"netns", "add", d},
		{"-n", s, "link", "add", cable, "type", "veth", "peer", "name", cable, "netns", d},
		{"-n", s, "addr", "add", "10.99.0.1/24", "dev", cable}, {"-n", d, "addr", "add", "10.99.0.2/24", "dev", cable},
		{"-n", s, "link", "set", cable, "up"}, {"-n", d, "link", "set", cable, "up"},
		{"-n", s, "link", "set", "lo", "up"}, {"-n", d, "link", "set", "lo", "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Logf("without network namespaces: ip %v: %s", args, out)
			return h
		}
	}
	h.source, h.target, h.addr = s, d, "10.99.0.2"
	return h
}

// plug pulls the source's end of the cable out, or puts it in again. It is false where there is no
// cable.
func (h *hosts) plug(in bool) bool {
	if h.source == "" {
		return false
	}
	state := "down"
	if in {
		state = "up"
	}
	if out, err := exec.Command("ip", "-n", h.source, "link", "set", cable, state).CombinedOutput(); err != nil {
		h.t.Errorf("ip link set %s: %s", state, out)
	}
	return true
}

// on does f on a machine: the processes that it starts live there, and so do the sockets that it
// makes, itself and not in goroutines.
func (h *hosts) on(host string, f func()) {
	h.t.Helper()
	if host == "" {
		f()
		return
	}
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		h.t.Fatal(err)
	}
	defer home.Close()
	there, err := os.Open("/run/netns/" + host)
	if err != nil {
		h.t.Fatal(err)
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		h.t.Fatal(err) // the thread ends with the goroutine
	}
	defer func() {
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err == nil {
			runtime.UnlockOSThread()
		}
	}()
	f()
}
