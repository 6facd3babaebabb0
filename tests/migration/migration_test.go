package migration

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
	"qblockd/tests/daemon"
	"qblockd/tests/rig"
)

var (
	flagRounds = flag.Int("migration.rounds", 2, "migrations")
	flagSeed   = flag.Uint64("migration.seed", 0, "seed of the first; 0: by the clock")
	flagCuts   = flag.Int("migration.cuts", 2, "how often the wire is cut in each")
)

const (
	// patience bounds each wait; nothing comes near it unless it hangs.
	patience = 2 * time.Minute
	// maxTries is how often a migration is begun that fails for a cut, as management tools do.
	maxTries = 5
)

// migration moves a disk.
type migration struct {
	t      *testing.T
	r      *rand.Rand
	h      *hosts
	wire   *wire
	guests *party
	source *daemon.Daemon
	target *daemon.Daemon
	qs, qt *daemon.QMP
	dirs   [2]string // of source and target
	creds  string    // the object, without its endpoint
	clear  bool      // it is not used, so that the kernel may send pages of the disk
	mode   types.MirrorCopyMode
	failed int // tries
}

// TestMigration moves disks under guests that write, while the wire is cut.
func TestMigration(t *testing.T) {
	rounds(t, *flagRounds, func(m *migration, pivot bool) {
		cuts := make([]cut, *flagCuts)
		at := int64(0)
		for k := range cuts {
			cuts[k] = randomCut(m.r, 8*diskSize/10)
			at += cuts[k].at
			cuts[k].at = at
		}
		m.move(pivot, cuts)
		m.goOn()
		m.t.Logf("%v, in the clear %v, pivot %v, %v: %d requests, %d made again, %d tries failed", m.mode, m.clear, pivot, cuts,
			m.guests.done(), m.guests.again(), m.failed)
	})
}

// rounds does f with new daemons, with another seed each time.
func rounds(t *testing.T, n int, f func(m *migration, pivot bool)) {
	daemon.Binary(t) // is built on this machine, not on that of a daemon
	first := *flagSeed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	for i := range n {
		seed := first + uint64(i)
		ok := t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { f(newMigration(t, seed), seed%2 == 0) })
		if !ok {
			t.Fatalf("again with -migration.rounds=1 -migration.seed=%d", seed)
		}
	}
}

// newMigration starts both daemons and the wire, and fills the disk.
func newMigration(t *testing.T, seed uint64) *migration {
	m := &migration{t: t, r: rand.New(rand.NewPCG(seed, 3)), h: newHosts(t), dirs: [2]string{t.TempDir(), t.TempDir()}}
	m.clear, m.mode = m.r.IntN(2) == 0, types.MirrorCopyModeWriteBlocking
	if m.r.IntN(2) == 0 {
		m.mode = types.MirrorCopyModeBackground
	}
	for _, dir := range m.dirs {
		x := rig.New(dir)
		cs := uint64(4096) << m.r.IntN(5)
		o := types.BlockdevCreateOptionsQcow2{Size: diskSize, ClusterSize: &cs}
		m.must(errors.Join(x.MakeFile("disk", 0, nil), x.CreateQcow2(context.Background(), "disk", o), x.Close()))
	}
	ca := certs.CA(t)
	m.creds = "tls-creds-x509,id=tls,dir=" + certs.Dir(t, ca, ca.Server(t), ca.Client(t))
	m.startSource()
	m.target, m.qt = m.start(m.h.target, m.dirs[1], m.creds+",endpoint=server,verify-peer=on")
	port := "10809"
	if m.h.target == "" {
		port = freePort(t)
	}
	m.wire = newWire(t, m.h, port)
	m.qt.Must(t, "nbd-server-stop", nil)
	m.qt.Must(t, "nbd-server-start", m.withTLS(map[string]any{"addr": map[string]any{
		"type": "inet", "data": map[string]any{"host": m.h.addr, "port": port}}}))
	m.export(m.qt)
	m.guests = newParty(m.r)
	m.must(m.guests.connect(m.source.NBDSocket(), "disk"))
	m.must(m.guests.fill())
	return m
}

func (m *migration) withTLS(o map[string]any) map[string]any {
	if !m.clear {
		o["tls-creds"] = "tls"
	}
	return o
}

func (m *migration) startSource() {
	m.source, m.qs = m.start(m.h.source, m.dirs[0], m.creds+",endpoint=client")
	m.export(m.qs)
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
}

// start runs a daemon with the disk as node "disk".
func (m *migration) start(host, dir, object string) (d *daemon.Daemon, q *daemon.QMP) {
	m.t.Helper()
	m.h.on(host, func() {
		d = daemon.Start(m.t, dir, "--object", object,
			"--blockdev", "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,file.filename=disk")
	})
	q = d.Dial(m.t)
	q.SetDeadline(time.Now().Add(10 * time.Minute))
	return d, q
}

func (m *migration) export(q *daemon.QMP) {
	m.t.Helper()
	q.Must(m.t, "block-export-add", map[string]any{
		"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true})
}

func (m *migration) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// move moves the disk, and the guests with it: with pivot under way, else while they rest.
func (m *migration) move(pivot bool, cuts []cut) {
	m.wire.cutAt(cuts...)
	for m.guests.begin(); !m.try(pivot); m.guests.begin() {
		m.must(m.guests.end())
		if m.failed++; m.failed == maxTries {
			m.t.Fatal("it does not come to an end")
		}
	}
	m.must(m.guests.end())
	if pivot {
		m.must(m.guests.each((*guest).flush))
		m.must(m.guests.lookAll())
	}
}

// try is one attempt. It is false if the mirror has failed: nothing is lost then.
func (m *migration) try(pivot bool) bool {
	m.mirror()
	if m.wait("BLOCK_JOB_READY") == "" {
		m.ready(pivot)
		if m.wait("BLOCK_JOB_COMPLETED") == "" {
			if !pivot {
				m.qs.Must(m.t, "blockdev-del", map[string]any{"node-name": "remote"})
			}
			return true
		}
	}
	m.qs.Must(m.t, "blockdev-del", map[string]any{"node-name": "remote"})
	return false
}

// mirror begins to copy.
func (m *migration) mirror() {
	m.qs.Must(m.t, "blockdev-add", daemon.Blockdev("nbd", "remote", m.withTLS(map[string]any{
		"server": map[string]any{"type": "inet", "host": "127.0.0.1", "port": m.wire.port()}, "export": "disk",
		"reconnect-delay": 30, "open-timeout": 30,
	})))
	m.qs.Events = nil
	m.qs.Must(m.t, "blockdev-mirror", map[string]any{
		"job-id": "move", "device": "disk", "target": "remote", "sync": "full", "copy-mode": m.mode})
}

// ready has the mirror run until the wire was cut as often as it is to be, and ends it.
func (m *migration) ready(pivot bool) {
	for end := time.Now().Add(patience); m.wire.cutsLeft() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("%d cuts are to come", m.wire.cutsLeft())
		}
		if pivot && m.wire.cutsLeft() == 1 && m.r.IntN(20) == 0 {
			break // the last one meets whatever comes
		}
	}
	if pivot {
		_, err := m.qs.Do("block-job-complete", map[string]any{"device": "move"})
		m.gone(err)
		return
	}
	m.must(m.guests.end())
	_, err := m.qs.Do("block-job-cancel", map[string]any{"device": "move"})
	m.gone(err)
}

// gone accepts that a job has ended before it was told something.
func (m *migration) gone(err error) {
	var e *daemon.Error
	if err != nil && !(errors.As(err, &e) && e.Class == "DeviceNotActive") {
		m.t.Fatal(err)
	}
}

// wait waits for an event of the job, or for its end; it is the error of that.
func (m *migration) wait(name string) string {
	m.t.Helper()
	for {
		e, err := m.qs.Next()
		m.must(err)
		var data struct{ Device, Error string }
		_ = json.Unmarshal(e.Data, &data)
		switch {
		case data.Device != "move":
		case e.Name == "BLOCK_JOB_COMPLETED" && data.Error != "":
			m.t.Logf("the mirror has failed: %s", data.Error)
			return data.Error
		case e.Name == name:
			return ""
		}
	}
}

// goOn ends the source, and has the guests go on at the target.
func (m *migration) goOn() {
	m.source.Stop(m.t)
	m.qt.Must(m.t, "nbd-server-stop", nil)
	m.qt.Must(m.t, "nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": m.target.NBDSocket()}}})
	m.export(m.qt)
	m.must(m.guests.connect(m.target.NBDSocket(), "disk"))
	m.must(m.guests.lookAll())
	m.must(m.guests.each(func(g *guest) (err error) {
		for i := 0; i < 60 && err == nil; i++ {
			err = g.step()
		}
		return err
	}))
	m.must(m.guests.lookAll())
	m.target.Stop(m.t)
	for _, dir := range m.dirs {
		check(m.t, filepath.Join(dir, "disk"))
	}
}

// check has qemu-img look an image over, which may have lost clusters only.
func check(t *testing.T, path string) {
	t.Helper()
	exe, err := exec.LookPath("qemu-img")
	if err != nil {
		return
	}
	out, err := exec.Command(exe, "check", "-f", "qcow2", path).CombinedOutput()
	var e *exec.ExitError
	if err != nil && !(errors.As(err, &e) && e.ExitCode() == 3) {
		t.Errorf("qemu-img check: %v\n%s", err, out)
	}
}
