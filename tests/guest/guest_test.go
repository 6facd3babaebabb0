package guest

import (
	"flag"
	"os/exec"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

var (
	flagRounds = flag.Int("guest.rounds", 0, "rounds of TestRounds, with the daemon killed in every other one")
	flagSeed   = flag.Uint64("guest.seed", 1, "seed of the first round")
	flagBinary = flag.String("guest.binary", "", "daemon to test; empty: that of the tree")
	flagOps    = flag.Int64("guest.ops", 300, "operations of the guest between what is done to its disk")
	flagWait   = flag.Duration("guest.wait", 10*time.Second, "longest wait for a request while the daemon lives and the guest runs")
)

const mib = 1 << 20

// Disks that outlive the death of their daemon under a guest that lives on. An image with metadata
// is then what it was at the last flush or later, unless each write is one.
var (
	rawDisk  = disk{format: "raw"}
	safeDisk = disk{format: "qcow2", export: ",writethrough=on"}
)

// round is a guest from its start to its end.
type round struct {
	t                *testing.T
	kernel           kernel
	initrd, emulator string
	h                *host
	m                *machine
	// the longest wait while the daemon lived
	longest time.Duration
}

// prepare makes all that a guest needs, and a daemon with a disk for it.
func prepare(t *testing.T, x disk, d device) *round {
	t.Helper()
	exe, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("SKIPPED: qemu-system-x86_64 is not installed")
	}
	r := &round{t: t, emulator: exe, kernel: findKernel(t)}
	r.initrd = initrd(t, r.kernel)
	bin := *flagBinary
	if bin == "" {
		bin = daemon.Binary(t)
	}
	r.h = start(t, bin, x, d.queues)
	return r
}

// newRound starts a guest that writes.
func newRound(t *testing.T, x disk, d device, seed uint64) *round {
	t.Helper()
	r := prepare(t, x, d)
	begin := time.Now()
	r.m = launch(t, func(m *machine, line string) *exec.Cmd {
		return exec.Command(r.emulator, r.arguments(m, line, d)...)
	})
	t.Logf("%s%s, %v: up after %v", x.format, x.export, d, time.Since(begin).Round(time.Millisecond))
	a := r.m.do(command{Do: "format", Device: "/dev/vda"})
	if want := d.features(); *flagBinary == "" &&
		(a.Features&(featureIndirect|featureEventIdx|featurePacked) != want || a.Queues != int64(d.queues)) {
		t.Errorf("the guest uses features %#x and %d queues", a.Features, a.Queues)
	}
	r.m.do(command{Do: "load", Seed: seed})
	r.step("load", func() {}, true)
	return r
}

// step does something to the disk and waits until the guest has done more to it. alive: the daemon
// lives through it.
func (r *round) step(name string, f func(), alive bool) {
	r.t.Helper()
	begin := time.Now()
	f()
	took := time.Since(begin)
	a := r.m.do(command{Do: "await", Ops: *flagOps})
	wait := time.Duration(a.Wait)
	r.t.Logf("%-9s %8v; %6d operations, longest wait %8v (%s); the guest stood still for %8v", name,
		took.Round(time.Millisecond), a.Ops, wait.Round(10*time.Microsecond), a.What,
		time.Duration(a.Pause).Round(10*time.Microsecond))
	if !alive {
		return
	}
	r.longest = max(r.longest, wait)
	if wait-time.Duration(a.Pause) > *flagWait {
		r.t.Errorf("%s: a %s took %v", name, a.What, wait)
	}
}

// moves changes what is below the guest in each way.
func (r *round) moves() {
	r.t.Helper()
	r.step("resize", func() {
		r.h.grow(16 * mib)
		r.m.do(command{Do: "grown", Size: r.h.size})
	}, true)
	base := r.h.top
	r.step("snapshot", r.h.snapshot, true)
	r.step("commit", func() { r.h.commit(base) }, true)
	r.step("mirror", r.h.mirror, true)
}

// check has the guest check all that it has written.
func (r *round) check() {
	r.t.Helper()
	a := r.m.do(command{Do: "check"})
	r.t.Logf("%d operations, all that was written is there; longest wait %v", a.Ops, r.longest)
}

// end checks, and ends everything.
func (r *round) end() {
	r.t.Helper()
	r.check()
	r.m.off()
	r.h.stop()
}

// TestGuest is one guest that sees all that can happen to its disk.
func TestGuest(t *testing.T) {
	r := newRound(t, rawDisk, device{queues: 4, packed: true, indirect: true, events: true}, *flagSeed)
	r.step("kill", r.h.kill, false)
	r.h.format = "qcow2"
	r.moves()
	r.end()
}

// TestRounds are many, with each kind of rings.
func TestRounds(t *testing.T) {
	if *flagRounds == 0 {
		t.Skip("rounds are for `make guest`")
	}
	var longest time.Duration
	for i := range *flagRounds {
		d := device{queues: 1 + 3*(i>>1&1), packed: i>>2&1 == 1, indirect: i>>3&1 == 0, events: i%3 != 2}
		t.Run("", func(t *testing.T) {
			if i&1 == 0 {
				r := newRound(t, disk{format: "qcow2"}, d, *flagSeed+uint64(i))
				r.moves()
				r.end()
				longest = max(longest, r.longest)
				return
			}
			x := rawDisk
			if i%4 == 3 {
				x = safeDisk
			}
			r := newRound(t, x, d, *flagSeed+uint64(i))
			for range 3 {
				r.step("kill", r.h.kill, false)
			}
			r.moves()
			r.step("kill", r.h.kill, false)
			r.end()
			longest = max(longest, r.longest)
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("the longest wait of all rounds is %v", longest)
}
