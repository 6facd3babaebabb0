package sealed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"qblockd/tests/daemon"
	"qblockd/tests/trial"
)

// object is JSON as the daemon takes it.
type object = map[string]any

// secrets are passwords by the names of their objects.
var secrets = map[string]string{"k0": "first secret", "k1": "zweites Geheimnis é", "k2": "3", "k3": "the fourth of them"}

// layer is an image of the chain.
type layer struct {
	node, path string
	kind       string                  // raw, luks, qcow2, sealed (qcow2 with LUKS inside), aes
	secret     string                  // that opens it; "" for those without
	bytes      []byte                  // what the disk is, seen from here
	snapshots  map[string][]byte       // nil: what they read from below has changed
	bitmaps    map[string]map[int]bool // granules that were written, by name
	// unsure: a commit may have written to it that did not end
	unsure bool
	// stale: what the bitmaps have is not known
	stale bool
}

func (l *layer) qcow2() bool { return l.kind == "qcow2" || l.kind == "sealed" || l.kind == "aes" }

// granularity is that of all bitmaps.
const granularity = 4096

// life is a daemon, and its lives.
type life struct {
	dir, bin string
	proc     *daemon.Process
	out      bytes.Buffer
	lives    int
	q        *daemon.QMP
	n        *daemon.NBD // of the chain's disk
}

// world is a daemon with a chain, the base first.
type world struct {
	life
	r     *rand.Rand
	chain []*layer
	// killed: images may have clusters that nothing refers to
	killed bool
	// everything that was made, for names
	count int
}

func (w *world) top() *layer { return w.chain[len(w.chain)-1] }

func (d *life) sock(name string) string {
	return filepath.Join(d.dir, fmt.Sprintf("%s%d", name, d.lives))
}

// limit is how long a trial may take.
const limit = 2 * time.Minute

// start begins another life of the daemon, with the secrets.
func (d *life) start() {
	d.lives++
	args := []string{
		"--pidfile", d.sock("pid"), "--nbd-server", "addr.type=unix,addr.path=" + d.sock("nbd"),
		"--chardev", "socket,id=mon,server=on,wait=off,path=" + d.sock("qmp"), "--monitor", "mon",
	}
	cmd := exec.Command(d.bin, args...)
	d.out.Reset()
	cmd.Dir, cmd.Stderr = d.dir, &d.out
	d.proc = trial.Get(daemon.Launch(cmd))
	trial.Must(d.proc.WaitFor(d.sock("pid"), 20*time.Second))
	d.q = trial.Get(daemon.DialQMP(d.sock("qmp"), time.Now().Add(limit)))
	for id, data := range secrets {
		d.do("object-add", object{"qom-type": "secret", "id": id, "data": data})
	}
}

// stop ends the daemon, in order or not.
func (d *life) stop(kill bool) {
	if d.n != nil {
		d.n.Drop()
		d.n = nil
	}
	if !kill {
		d.do("quit", nil)
		if !d.proc.Ended(20 * time.Second) {
			trial.Fail("the daemon does not end")
		}
	}
	d.proc.Kill()
	d.q.Close()
	if s := d.proc.Cmd.ProcessState; !kill && !s.Success() {
		trial.Fail("the daemon ended with %v", s)
	}
}

// do executes a command that has to succeed.
func (d *life) do(command string, args object) json.RawMessage {
	if args == nil {
		args = object{}
	}
	v, err := d.q.Do(command, args)
	if err != nil {
		trial.Fail("%s %v: %w", command, args, err)
	}
	return v
}

// may executes a command that may be refused, if with that text.
func (d *life) may(command string, args object, refusal string) bool {
	_, err := d.q.Do(command, args)
	var refused *daemon.Error
	switch {
	case err == nil:
		return true
	case errors.As(err, &refused) && refused.Desc == refusal:
		return false
	}
	trial.Fail("%s %v: %w", command, args, err)
	return false
}

// await waits until a job has the status, and tells whether it has failed instead.
func (d *life) await(id, status string) (failed error) {
	for {
		e := trial.Get(d.q.Next())
		if e.Name != "JOB_STATUS_CHANGE" {
			continue
		}
		var d struct{ ID, Status string }
		trial.Must(json.Unmarshal(e.Data, &d))
		switch {
		case d.ID == id && d.Status == status:
			return nil
		case d.ID == id && d.Status == "aborting":
			return fmt.Errorf("job %s fails", id)
		}
	}
}

// finish waits for the end of a job, which has to succeed.
func (d *life) finish(id string) {
	trial.Must(d.await(id, "concluded"))
	var jobs []struct{ ID, Error string }
	trial.Must(json.Unmarshal(d.do("query-jobs", nil), &jobs))
	for _, j := range jobs {
		if j.ID == id && j.Error != "" {
			trial.Fail("job %s: %s", id, j.Error)
		}
	}
	d.do("job-dismiss", object{"id": id})
}

// job is what all jobs are given: they wait to be dismissed.
func (w *world) job(more object) (id string, args object) {
	w.count++
	id = fmt.Sprint("j", w.count)
	args = object{"job-id": id, "auto-dismiss": false}
	for k, v := range more {
		args[k] = v
	}
	return id, args
}

// options are those that open a layer over what backing is.
func (l *layer) options(backing any) object {
	o := object{"driver": "raw", "file": object{"driver": "file", "filename": l.path}}
	switch l.kind {
	case "luks":
		o["driver"], o["key-secret"] = "luks", l.secret
	case "sealed":
		o["encrypt"] = object{"format": "luks", "key-secret": l.secret}
	case "aes":
		o["encrypt"] = object{"format": "aes", "key-secret": l.secret}
	}
	if l.qcow2() {
		o["driver"], o["backing"] = "qcow2", backing
	}
	return o
}

// add opens a layer over the node backing, nil for none.
func (w *world) add(l *layer, backing any, readOnly bool) {
	o := l.options(backing)
	o["node-name"], o["read-only"] = l.node, readOnly
	w.do("blockdev-add", o)
}

// open opens the whole chain, and exports it.
func (w *world) open() {
	var backing any
	for i, l := range w.chain {
		w.add(l, backing, i < len(w.chain)-1)
		backing = l.node
	}
	w.export()
}

func (w *world) export() {
	w.do("block-export-add", object{"type": "nbd", "id": "e", "node-name": w.top().node, "name": "e", "writable": true})
	w.dial()
}

func (w *world) unexport() {
	w.n.Close()
	w.n = nil
	w.do("block-export-del", object{"id": "e", "mode": "hard"})
	for {
		if e := trial.Get(w.q.Next()); e.Name == "BLOCK_EXPORT_DELETED" {
			return
		}
	}
}

// dial connects anew: the size is told once.
func (w *world) dial() {
	if w.n != nil {
		w.n.Close()
	}
	w.n = trial.Get(daemon.DialNBDBy(w.sock("nbd"), "e", time.Now().Add(limit)))
	if w.n.Size != int64(len(w.top().bytes)) {
		trial.Fail("the disk has %d bytes instead of %d", w.n.Size, len(w.top().bytes))
	}
}

// create makes an image, and what it will be in the chain. Its disk reads as zeroes, unless raw
// bytes of a luks image were never written: those are written.
func (w *world) create(kind string, size int) *layer {
	w.count++
	l := &layer{node: fmt.Sprint("n", w.count), path: filepath.Join(w.dir, fmt.Sprint("i", w.count)), kind: kind}
	l.bytes, l.snapshots, l.bitmaps = make([]byte, size), map[string][]byte{}, map[string]map[int]bool{}
	trial.Must(os.WriteFile(l.path, nil, 0o600))
	o := object{"driver": "raw", "size": size}
	file := object{"driver": "file", "filename": l.path, "node-name": "f" + l.node}
	if kind != "raw" && kind != "qcow2" {
		l.secret = fmt.Sprint("k", w.r.IntN(len(secrets)))
	}
	alg := object{"key-secret": l.secret, "iter-time": 1}
	if trial.One(w.r, 2) {
		// Keys of 192 bits in cbc are an assertion of qemu-img.
		alg["cipher-alg"] = trial.Pick(w.r, "aes-128", "aes-256", "serpent-256", "twofish-128")
		alg["cipher-mode"], alg["hash-alg"] = trial.Pick(w.r, "cbc", "xts"), trial.Pick(w.r, "sha1", "sha256", "sha512")
		alg["ivgen-alg"] = trial.Pick(w.r, "plain", "plain64")
	}
	w.do("blockdev-add", file)
	switch {
	case kind == "raw":
		trial.Must(os.Truncate(l.path, int64(size)))
	case kind == "luks":
		o = object{"driver": "luks", "file": "f" + l.node, "size": size}
		for k, v := range alg {
			o[k] = v
		}
		trial.Must(w.make(o))
	default:
		o = object{"driver": "qcow2", "file": "f" + l.node, "size": size,
			"cluster-size": 512 << w.r.IntN(9), "version": trial.Pick(w.r, "v2", "v3")}
		if o["version"] == "v3" && o["cluster-size"].(int) >= 16384 && trial.One(w.r, 3) {
			o["extended-l2"] = true
		}
		switch kind {
		case "sealed":
			alg["format"] = "luks"
			o["encrypt"] = alg
		case "aes":
			o["encrypt"] = object{"format": "qcow", "key-secret": l.secret}
		}
		trial.Must(w.make(o))
	}
	w.do("blockdev-del", object{"node-name": "f" + l.node})
	return l
}

func (w *world) make(o object) error {
	w.count++
	id := fmt.Sprint("c", w.count)
	if _, err := w.q.Do("blockdev-create", object{"job-id": id, "options": o}); err != nil {
		return fmt.Errorf("%v: %w", o, err)
	}
	w.finish(id)
	return nil
}

// run is a program that has to end with one of codes.
func run(codes []int, name string, args ...string) {
	cmd := exec.Command(name, args...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || !slices.Contains(codes, cmd.ProcessState.ExitCode()) {
		trial.Fail("%s %q: %w: %s", name, args, err, out)
	}
}
