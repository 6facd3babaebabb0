package hostile

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"qblockd/tests/trial"
)

// Failure is what a case has found.
type Failure struct {
	Kind string // the same for the same fault, more or less
	Text string
	// Fatal: the daemon cannot be used any more.
	Fatal bool
}

func (f *Failure) Error() string { return f.Kind + ": " + f.Text }

// fail ends the case.
func fail(fatal bool, kind, format string, args ...any) {
	trial.Must(&Failure{kind, fmt.Sprintf(format, args...), fatal})
}

const (
	imageName = "a.qcow2"
	canaries  = 6 // files in folder canary
)

// run is a case under way.
type run struct {
	client
	c     *Case
	r     *rand.Rand
	m     *model
	rep   *Report // of the damaged image
	image string  // node of the damaged image; "" where it has no name
	over  bool    // what is exported is an overlay of it
	now   string  // what took the place of the last of nodes
	// below is what the image is to show: what is written since is in an overlay. nil without one.
	below map[int64][]uint64
	nodes []string // to be deleted from the last on

	size    int64 // of what is exported
	bitmaps []string
	renamed bool // the header names another backing file now
}

// Run does a case on the daemon s.
func Run(s *server, c *Case, seed uint64) (trace []string, failed *Failure) {
	r := &run{client: client{s: s}, c: c, r: c.Rand(seed), m: newModel()}
	s.said()
	s.calm()
	err := trial.Run(r.all)
	if errors.Is(err, errGone) {
		err = trial.Run(r.leave)
	}
	if r.q != nil {
		r.q.Close()
	}
	r.hangUp()
	return r.trace, r.verdict(err)
}

// verdict adds what is to be seen from outside to what the case itself has found.
func (r *run) verdict(err error) *Failure {
	var f *Failure
	if err != nil && !errors.As(err, &f) {
		f = &Failure{"unexpected", err.Error(), true}
	}
	if f != nil && f.Fatal {
		r.s.Ended(300 * time.Millisecond)
	}
	log := r.s.said()
	cause := diagnosis(log)
	switch {
	case r.s.Ended(0) || cause != "" && strings.Contains(log, "goroutine"):
		what := "panicked and lives: "
		if r.s.Ended(300 * time.Millisecond) {
			what = "died: "
		}
		return &Failure{what + cause, log[:min(len(log), 6000)], true}
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

func (r *run) path(name string) string { return filepath.Join(r.s.work(), name) }

// leave is what a client does that has waited for long: it goes. What it asked for is to end then
// and leave everything as it was, so that another client can put things away.
func (r *run) leave() {
	r.q.Close()
	end := time.Now().Add(r.s.limits.Deadline)
	r.connect(end)
	for {
		added := false
		err := trial.Run(func() {
			r.close()
			// The name may be taken as long as what opens it has not ended.
			if added = r.try("blockdev-add", args{"driver": "null-co", "node-name": "d", "read-zeroes": true}); added {
				r.try("blockdev-del", args{"node-name": "d"})
			}
		})
		if added {
			trial.Must(err)
			return
		}
		var f *Failure
		if time.Now().After(end) || errors.As(err, &f) && strings.HasPrefix(f.Kind, "no ") {
			fail(true, "no answer to "+r.cannotWait+", and no end of it", "%v", err)
		}
		time.Sleep(50 * time.Millisecond) // until it has ended
	}
}

// all is the life of a case.
func (r *run) all() {
	r.lay()
	r.connect(time.Now().Add(r.s.limits.Deadline))
	r.readOnly(true)
	r.readWrite()
	r.readOnly(false)
	r.compareChecks()
}

// lay puts the files of the case in place.
func (r *run) lay() {
	for _, e := range trial.Get(os.ReadDir(r.s.work())) {
		trial.Must(os.RemoveAll(r.path(e.Name())))
	}
	if r.c.Base.Backing != "" {
		raw := make([]byte, 128<<10)
		for i := range raw {
			raw[i] = byte(i>>9) ^ 0x5a
		}
		trial.Must(os.WriteFile(r.path("back.raw"), raw, 0o600))
		b := NewBase(Spec{Version: 3, ClusterBits: 12, Order: 4, Size: 1 << 20})
		trial.Must(b.WriteTo(r.path("back.qcow2")))
		for _, n := range []string{"back.raw", "back.qcow2"} {
			trial.Must(os.Chtimes(r.path(n), long, long))
		}
	}
	trial.Must(r.c.Base.WriteTo(r.path(imageName), r.c.Damages...))
	r.rep = r.inspect()
	for _, d := range r.c.Damages {
		// What is its own backing file changes with what is written to it.
		own := strings.HasPrefix(d.Field, "backing") && strings.Contains(d.Value, imageName)
		r.rep.lost = r.rep.lost || own
	}
}

func (r *run) inspect() *Report {
	f := trial.Get(os.Open(r.path(imageName)))
	defer f.Close()
	return Inspect(f, trial.Get(f.Stat()).Size())
}

// readOnly opens the image for reading and looks at all of it. The first time what it shows is
// taken as right, later it is compared.
func (r *run) readOnly(first bool) {
	if first {
		trial.Must(os.Chtimes(r.path(imageName), long, long))
	}
	opts := onFile("d", imageName)
	r.now, r.image = "", "d"
	if r.try("blockdev-add", opts) {
		r.s.count("opened for reading")
		r.nodes = []string{"d"}
		r.export(false)
		r.query()
		r.status()
		r.readAll(first, true)
		if first && r.s.limits.Reference {
			r.reference()
		}
		r.close()
	} else if !first && len(r.m.may) > 0 && !r.over && !r.renamed && r.rep.Parsed && !r.rep.lost {
		fail(false, "cannot be opened any more", "%s", r.trace[len(r.trace)-1])
	}
	if first {
		if i, err := os.Stat(r.path(imageName)); err != nil || !i.ModTime().Equal(long) {
			fail(false, "reading changed the image", "")
		}
	}
}

// onFile are the options of a node that reads the image in a file.
func onFile(node, name string) args {
	return args{"driver": "qcow2", "node-name": node, "read-only": true,
		"file": args{"driver": "file", "filename": name, "read-only": true}}
}

// compareChecks: an image that was sound is so afterwards.
func (r *run) compareChecks() {
	after := r.inspect()
	switch {
	case len(r.rep.Corruptions) > 0 || !r.rep.Parsed || r.rep.lost || r.rep.Dirty:
	case !after.Parsed:
		fail(false, "a sound image is broken", "its header is")
	case len(after.Corruptions) > 0:
		fail(false, "a sound image has got corruptions", "%s", strings.Join(after.Corruptions, "; "))
	}
}

// export serves the node.
func (r *run) export(writable bool) {
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
		if r.try("block-export-add", a) {
			return
		}
		delete(a, "bitmaps")
	}
	r.try("block-export-add", a)
}

// unexport takes the export away.
func (r *run) unexport() {
	r.hangUp()
	if r.try("block-export-del", args{"id": "x", "mode": "hard"}) {
		r.event("BLOCK_EXPORT_DELETED", "x")
	}
}

// close takes the export and the nodes away again.
func (r *run) close() {
	r.unexport()
	for ; len(r.nodes) > 0; r.nodes = r.nodes[:len(r.nodes)-1] {
		node := r.nodes[len(r.nodes)-1]
		_, refused := r.do("blockdev-del", args{"node-name": node})
		if refused != nil && len(r.nodes) == 1 { // overlays went with the export
			fail(true, "a node stays", "%s: %s", node, refused.Desc)
		}
	}
	r.empty()
}

// steps is how many random steps a case has.
const steps = 10

// readWrite opens the image for writing, or an overlay of it, and does this and that.
func (r *run) readWrite() {
	r.over = r.r.IntN(4) == 0
	if !r.open() {
		return
	}
	r.export(true)
	r.query()
	r.readAll(r.over, true)
	for range steps {
		trial.Weighted(r.r, ops, func(o op) int { return o.weight }).do(r)
	}
	r.readAll(false, false)
	r.flush()
	r.status()
	r.query()
	r.close()
	r.m.unflushed()
	switch {
	case r.over:
		clear(r.m.may) // the overlay is gone
	case r.below != nil:
		r.m.may = r.below
	}
	if r.renamed {
		maps.DeleteFunc(r.m.may, func(s int64, _ []uint64) bool { return !r.m.touched[s] })
	}
}

func file(name string) args { return args{"driver": "file", "filename": name, "discard": "unmap"} }

// open opens for writing.
func (r *run) open() (ok bool) {
	r.now, r.image = "", "d"
	o := r.options("d")
	if r.over {
		b := NewBase(Spec{Version: 3, ClusterBits: 16, Order: 4, Size: max(512, min(r.c.Base.Size, 1<<30)),
			Backing: imageName, BackingFormat: "qcow2"})
		trial.Must(b.WriteEmpty(r.path("over.qcow2")))
		o = args{"driver": "qcow2", "node-name": "d", "discard": "unmap", "file": file("over.qcow2")}
		r.image = ""
		if r.r.IntN(2) == 0 {
			r.image = "base"
			o["backing"] = onFile("base", imageName)
		}
	}
	if ok = r.try("blockdev-add", o); ok {
		r.nodes = []string{"d"}
	}
	return ok
}

// options of the image, some of them not the default's.
func (r *run) options(node string) args {
	o := args{"driver": "qcow2", "node-name": node, "discard": "unmap", "file": file(imageName)}
	for _, x := range []struct {
		name string
		v    any
		v3   bool
	}{
		{"lazy-refcounts", true, true}, {"l2-cache-entry-size", 512, false}, {"overlap-check", "all", false},
		{"detect-zeroes", "unmap", false}, {"discard-no-unref", true, true}, {"cache-size", 1 << 20, false},
	} {
		if r.r.IntN(8) == 0 && (r.c.Base.Version >= 3 || !x.v3) {
			o[x.name] = x.v
		}
	}
	return o
}
