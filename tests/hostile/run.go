package hostile

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"qblockd/tests/daemon"
)

// Failure is what a case has found.
type Failure struct {
	Kind string // the same for the same fault, more or less
	Text string
	// Fatal: the daemon cannot be used any more.
	Fatal bool
}

func (f *Failure) Error() string { return f.Kind + ": " + f.Text }

const (
	imageName = "a.qcow2"
	canaries  = 6 // files in folder canary
)

// run is a case under way.
type run struct {
	s     *server
	c     *Case
	r     *rand.Rand
	q     *daemon.QMP
	n     *daemon.NBD
	m     *model
	rep   *Report // of the damaged image
	image string  // node of the damaged image; "" where it has no name
	over  bool    // what is exported is an overlay of it
	now   string  // what took the place of the last of nodes
	// below is what the image is to show: what is written since is in an overlay. nil without one.
	below map[int64][]uint64
	nodes []string // to be deleted from the last on
	trace []string

	size    int64 // of what is exported
	names   int
	bitmaps []string
	// cannotWait is the command that the client did not wait for.
	cannotWait string
	renamed    bool // the header names another backing file now
}

// Run does a case on the daemon s.
func Run(s *server, c *Case, seed uint64) (trace []string, failed *Failure) {
	r := &run{s: s, c: c, r: c.Rand(seed), m: newModel()}
	s.said()
	s.calm()
	err := r.all()
	if errors.Is(err, errGone) {
		err = r.leave()
	}
	if r.q != nil {
		r.q.Close()
	}
	if r.n != nil {
		r.n.Drop()
	}
	return r.trace, r.verdict(err)
}

// verdict adds what is to be seen from outside to what the case itself has found.
func (r *run) verdict(err error) *Failure {
	var f *Failure
	if err != nil && !errors.As(err, &f) {
		f = &Failure{"unexpected", err.Error(), true}
	}
	if f != nil && f.Fatal && !r.s.dead() {
		r.s.ends(300 * time.Millisecond)
	}
	log := r.s.said()
	cause := diagnosis(log)
	switch {
	case r.s.dead() || cause != "" && strings.Contains(log, "goroutine"):
		what := "panicked and lives: "
		if r.s.dead() || r.s.ends(300*time.Millisecond) {
			what = "died: "
		}
		if len(log) > 6000 {
			log = log[:6000]
		}
		return &Failure{what + cause, log, true}
	case f != nil:
		return f
	}
	if t := r.s.troubled(); t != "" {
		return &Failure{"the other disk", t, true}
	}
	if p := r.s.peak(); p > r.s.limits.Memory {
		return &Failure{"memory", fmt.Sprintf("%d MiB resident", p>>20), true}
	}
	if name := changed(filepath.Join(r.s.dir, "canary"), canaries); name != "" {
		return &Failure{"another file", name + " was changed", true}
	}
	return nil
}

func (r *run) note(format string, args ...any) {
	r.trace = append(r.trace, fmt.Sprintf(format, args...))
}

func (r *run) path(name string) string { return filepath.Join(r.s.work(), name) }

// errGone: the client has left, as the answer to its command took too long.
var errGone = errors.New("the client has left")

// do executes a command. refused is its error, if it was refused; err ends the case.
func (r *run) do(command string, args any) (ret []byte, refused *daemon.Error, err error) {
	began := time.Now()
	patience := r.s.limits.Patience
	if r.cannotWait != "" {
		patience = r.s.limits.Deadline
	}
	r.q.SetDeadline(began.Add(patience))
	ret, e := r.q.Do(command, args)
	took := time.Since(began)
	slow := ""
	if took > time.Second {
		slow = fmt.Sprintf(" (%v)", took.Round(time.Millisecond))
	}
	switch {
	case e == nil:
		r.note("%s %v: ok%s", command, args, slow)
		r.s.count(command + " done")
		return ret, nil, nil
	case errors.As(e, &refused):
		r.note("%s %v: %s%s", command, args, refused.Desc, slow)
		r.s.count(command + " refused")
		return nil, refused, nil
	case os.IsTimeout(e) && r.cannotWait == "":
		r.note("%s %v: no answer%s", command, args, slow)
		r.cannotWait = command
		return nil, nil, errGone
	}
	r.note("%s %v: %v%s", command, args, e, slow)
	return nil, nil, &Failure{"no answer to " + command, e.Error(), true}
}

// leave is what a client does that has waited for long: it goes. What it asked for is to end then
// and leave everything as it was, so that another client can put things away.
func (r *run) leave() error {
	r.q.Close()
	end := time.Now().Add(r.s.limits.Deadline)
	q, err := daemon.DialQMP(r.s.qmp(), end)
	if err != nil {
		return &Failure{"no answer to a new client", err.Error(), true}
	}
	r.q = q
	for {
		err := r.close()
		var f *Failure
		if err == nil {
			// The name may be taken as long as what opens it has not ended.
			var ok bool
			if ok, err = r.try("blockdev-add", args{"driver": "null-co", "node-name": "d", "read-zeroes": true}); ok {
				_, err = r.try("blockdev-del", args{"node-name": "d"})
				return err
			}
		}
		if time.Now().After(end) || errors.As(err, &f) && strings.HasPrefix(f.Kind, "no ") {
			return &Failure{"no answer to " + r.cannotWait + ", and no end of it", fmt.Sprint(err), true}
		}
		time.Sleep(50 * time.Millisecond) // until it has ended
	}
}

// try is do for what may be refused.
func (r *run) try(command string, args any) (ok bool, err error) {
	_, refused, err := r.do(command, args)
	return err == nil && refused == nil, err
}

// request runs a request of the export. failed: an error was the answer.
func (r *run) request(what string, f func(n *daemon.NBD) error) (ok bool, err error) {
	if r.n == nil {
		if ok, err := r.dial(); !ok || err != nil {
			return false, err
		}
	}
	began := time.Now()
	r.n.SetDeadline(began.Add(r.s.limits.Deadline))
	e := f(r.n)
	var errno syscall.Errno
	switch {
	case e == nil:
		r.note("%s: ok", what)
		r.s.count(strings.Fields(what)[0] + " done")
		return true, nil
	case os.IsTimeout(e):
		r.note("%s: no answer", what)
		return false, &Failure{"no answer to " + strings.Fields(what)[0], what, true}
	case errors.As(e, &errno) && errno != syscall.EPIPE && errno != syscall.ECONNRESET:
		r.note("%s: %v", what, errno)
		r.s.count(strings.Fields(what)[0] + " failed")
		return false, nil
	}
	r.note("%s: connection lost: %v", what, e)
	r.n.Drop()
	r.n = nil
	if r.s.ends(100 * time.Millisecond) {
		return false, &Failure{"died", "", true}
	}
	return false, nil
}

func (r *run) dial() (ok bool, err error) {
	n, e := daemon.DialNBDBy(r.s.nbd(), "x", time.Now().Add(r.s.limits.Deadline))
	if e != nil {
		r.note("connect: %v", e)
		if os.IsTimeout(e) {
			return false, &Failure{"no answer to connect", e.Error(), true}
		}
		return false, nil
	}
	r.n = n
	return true, nil
}

// all is the life of a case.
func (r *run) all() error {
	if err := r.lay(); err != nil {
		return err
	}
	q, err := daemon.DialQMP(r.s.qmp(), time.Now().Add(r.s.limits.Deadline))
	if err != nil {
		return &Failure{"no answer to a new client", err.Error(), true}
	}
	r.q = q
	if err := r.readOnly(true); err != nil {
		return err
	}
	if err := r.readWrite(); err != nil {
		return err
	}
	if err := r.readOnly(false); err != nil {
		return err
	}
	return r.compareChecks()
}

// lay puts the files of the case in place.
func (r *run) lay() error {
	list, err := os.ReadDir(r.s.work())
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.RemoveAll(r.path(e.Name())); err != nil {
			return err
		}
	}
	if r.c.Base.Backing != "" {
		raw := make([]byte, 128<<10)
		for i := range raw {
			raw[i] = byte(i>>9) ^ 0x5a
		}
		if err := os.WriteFile(r.path("back.raw"), raw, 0o600); err != nil {
			return err
		}
		b := NewBase(Spec{Version: 3, ClusterBits: 12, Order: 4, Size: 1 << 20})
		if err := b.WriteTo(r.path("back.qcow2")); err != nil {
			return err
		}
		for _, n := range []string{"back.raw", "back.qcow2"} {
			if err := os.Chtimes(r.path(n), long, long); err != nil {
				return err
			}
		}
	}
	if err := r.c.Base.WriteTo(r.path(imageName), r.c.Damages...); err != nil {
		return err
	}
	r.rep, err = r.inspect()
	for _, d := range r.c.Damages {
		// What is its own backing file changes with what is written to it.
		r.rep.lost = r.rep.lost || strings.HasPrefix(d.Field, "backing") && strings.Contains(d.Value, imageName)
	}
	return err
}

func (r *run) inspect() (*Report, error) {
	f, err := os.Open(r.path(imageName))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	i, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return Inspect(f, i.Size()), nil
}

// readOnly opens the image for reading and looks at all of it. The first time what it shows is
// taken as right, later it is compared.
func (r *run) readOnly(first bool) error {
	if first {
		if err := os.Chtimes(r.path(imageName), long, long); err != nil {
			return err
		}
	}
	opts := args{"driver": "qcow2", "node-name": "d", "read-only": true,
		"file": args{"driver": "file", "filename": imageName, "read-only": true}}
	r.now, r.image = "", "d"
	ok, err := r.try("blockdev-add", opts)
	if err != nil {
		return err
	}
	if ok {
		r.s.count("opened for reading")
		r.nodes = []string{"d"}
		if err := r.export(false); err != nil {
			return err
		}
		if err := r.query(); err != nil {
			return err
		}
		if err := r.status(); err != nil {
			return err
		}
		if err := r.readAll(first, true); err != nil {
			return err
		}
		if first && r.s.limits.Reference {
			if err := r.reference(); err != nil {
				return err
			}
		}
		if err := r.close(); err != nil {
			return err
		}
	} else if !first && len(r.m.may) > 0 && !r.over && !r.renamed && r.rep.Parsed && !r.rep.lost {
		return &Failure{"cannot be opened any more", r.trace[len(r.trace)-1], false}
	}
	if first {
		if i, err := os.Stat(r.path(imageName)); err != nil || !i.ModTime().Equal(long) {
			return &Failure{"reading changed the image", "", false}
		}
	}
	return nil
}

// compareChecks: an image that was sound is so afterwards.
func (r *run) compareChecks() error {
	after, err := r.inspect()
	if err != nil {
		return err
	}
	if len(r.rep.Corruptions) == 0 && r.rep.Parsed && !r.rep.lost && !r.rep.Dirty {
		if !after.Parsed {
			return &Failure{"a sound image is broken", "its header is", false}
		}
		if len(after.Corruptions) > 0 {
			return &Failure{"a sound image has got corruptions", strings.Join(after.Corruptions, "; "), false}
		}
	}
	return nil
}

// export serves the node.
func (r *run) export(writable bool) error {
	a := args{"type": "nbd", "id": "x", "node-name": r.top(), "name": "x", "writable": writable}
	var bitmaps []string
	if r.r.IntN(2) == 0 {
		for _, b := range []string{"b0", "b1", "b2"} {
			if r.c.Base.Bitmaps && r.r.IntN(2) == 0 {
				bitmaps = append(bitmaps, b)
			}
		}
	}
	if len(bitmaps) > 0 {
		a["bitmaps"] = bitmaps
		if ok, err := r.try("block-export-add", a); ok || err != nil {
			return err
		}
		delete(a, "bitmaps")
	}
	_, err := r.try("block-export-add", a)
	return err
}

// unexport takes the export away.
func (r *run) unexport() error {
	if r.n != nil {
		r.n.Drop()
		r.n = nil
	}
	ok, err := r.try("block-export-del", args{"id": "x", "mode": "hard"})
	if ok && err == nil {
		err = r.event("BLOCK_EXPORT_DELETED", "x")
	}
	return err
}

// close takes the export and the nodes away again.
func (r *run) close() error {
	if err := r.unexport(); err != nil {
		return err
	}
	for ; len(r.nodes) > 0; r.nodes = r.nodes[:len(r.nodes)-1] {
		node := r.nodes[len(r.nodes)-1]
		if _, refused, err := r.do("blockdev-del", args{"node-name": node}); err != nil {
			return err
		} else if refused != nil && len(r.nodes) == 1 { // overlays went with the export
			return &Failure{"a node stays", node + ": " + refused.Desc, true}
		}
	}
	return r.empty()
}
