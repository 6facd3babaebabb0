package hostile

import (
	"maps"
	"slices"

	"qblockd/tests/trial"
)

// top is the node that is exported.
func (r *run) top() string {
	if r.now != "" {
		return r.now
	}
	return r.nodes[len(r.nodes)-1]
}

// hides tells whether the image may have data behind the end of its disk.
func (c *Case) hides() bool {
	return slices.ContainsFunc(c.Damages, func(d *Damage) bool { return d.Field == "size" })
}

func (r *run) resize() {
	cs := r.c.Base.cs()
	to := max(0, trial.Pick(r.r, r.size+cs, r.size+512, r.size*2, r.size-cs, r.size-512, r.size/2,
		0, 512, r.c.Base.Size, 1<<30, 1<<40, 1<<56, 1<<61)) &^ 511
	if r.below != nil {
		return // an overlay goes with its export
	}
	// An export keeps the size as it is.
	r.unexport()
	ok := r.try("block_resize", args{"node-name": r.top(), "size": to})
	r.export(true)
	if !ok || to < r.size {
		r.m.forget(min(to, r.size), 1<<62)
	}
	if !ok {
		return
	}
	for s := r.size / sector; !r.c.hides() && to > r.size && s < min(to/sector, r.size/sector+4096); s++ {
		r.m.may[s] = []uint64{r.m.zero}
		r.m.written[s], r.m.touched[s] = true, true
	}
	r.size = to
}

func (r *run) snapshot() {
	r.try("blockdev-snapshot-internal-sync", args{"device": r.top(), "name": r.name("n")})
}

func (r *run) deleteSnapshot() {
	name := trial.Pick(r.r, "snap0", "snap1", "n1", "n2")
	r.try("blockdev-snapshot-delete-internal-sync", args{"device": r.top(), "name": name})
}

func (r *run) bitmap() {
	names := append([]string{"b0", "b1", "b2"}, r.bitmaps...)
	a := args{"node": r.top(), "name": trial.Pick(r.r, names...)}
	switch r.r.IntN(6) {
	case 0, 1:
		name := r.name("m")
		a["name"], a["persistent"] = name, r.r.IntN(3) > 0
		if r.r.IntN(2) == 0 {
			a["granularity"] = 512 << r.r.IntN(12)
		}
		r.bitmaps = append(r.bitmaps, name)
		r.try("block-dirty-bitmap-add", a)
	case 2:
		r.try("block-dirty-bitmap-remove", a)
	case 3:
		r.try("block-dirty-bitmap-clear", a)
	case 4:
		from := []string{trial.Pick(r.r, names...)}
		r.try("block-dirty-bitmap-merge", args{"node": a["node"], "target": a["name"], "bitmaps": from})
	case 5:
		r.try(trial.Pick(r.r, "block-dirty-bitmap-disable", "block-dirty-bitmap-enable",
			"x-debug-block-dirty-bitmap-sha256"), a)
	}
}

func (r *run) stream() { r.job("block-stream", args{"device": r.top()}) }

// withTarget adds a node that takes what a job copies, of the right size.
func (r *run) withTarget(f func()) {
	if r.try("blockdev-add", args{"driver": "null-co", "node-name": "null", "size": r.size, "read-zeroes": true}) {
		f()
		r.try("blockdev-del", args{"node-name": "null"})
	}
}

func (r *run) backup() {
	r.withTarget(func() {
		a := args{"device": r.top(), "target": "null", "sync": trial.Pick(r.r, "full", "top", "none")}
		if r.c.Base.Bitmaps && r.r.IntN(2) == 0 {
			a["sync"], a["bitmap"] = "incremental", "b0"
		}
		r.job("blockdev-backup", a)
	})
}

func (r *run) mirror() {
	r.withTarget(func() {
		r.job("blockdev-mirror", args{"device": r.top(), "target": "null", "sync": "full",
			"copy-mode": trial.Pick(r.r, "background", "write-blocking")})
	})
}

func (r *run) changeBacking() {
	name := trial.Pick(r.r, imageName, "back.raw", "none", "", "../canary/raw")
	if r.try("change-backing-file", args{"device": r.top(), "image-node-name": r.top(), "backing-file": name}) {
		r.renamed = true
	}
}

func (r *run) amend() {
	o := args{"driver": "qcow2"}
	switch r.r.IntN(3) {
	case 0:
		o["lazy-refcounts"] = r.r.IntN(2) == 0
	case 1:
		o["version"] = trial.Pick(r.r, "v2", "v3")
	}
	r.job("x-blockdev-amend", args{"node-name": r.nodes[0], "options": o, "force": r.r.IntN(2) == 0})
}

func (r *run) reopen() {
	if !r.over && len(r.nodes) == 1 {
		r.try("blockdev-reopen", args{"options": []args{r.options("d")}})
	}
}

// overlay takes an external snapshot.
func (r *run) overlay() {
	name := r.name("o")
	if !r.try("blockdev-snapshot-sync",
		args{"node-name": r.top(), "snapshot-file": name + ".qcow2", "snapshot-node-name": name}) {
		return
	}
	if r.below == nil {
		r.m.flushed() // it was
		r.below = maps.Clone(r.m.may)
	}
	r.nodes = append(r.nodes, name)
	r.now = ""
}

// commit brings what the topmost overlay has into what lies below.
func (r *run) commit() {
	a := args{"device": r.top()}
	switch {
	case len(r.nodes) > 1:
		a["base-node"] = r.nodes[len(r.nodes)-2]
	case r.over && r.image != "":
		a["base-node"] = r.image
	default:
		return
	}
	switch {
	case !r.job("block-commit", a):
		// Some of it may be in the base, also of what nobody knows, as what was discarded.
		maps.DeleteFunc(r.below, func(s int64, _ []uint64) bool { return r.m.touched[s] || r.m.lost[s] })
	case len(r.nodes) > 1:
		// What was the base has taken the place of its overlay, whose node is there until it is deleted.
		r.try("blockdev-del", args{"node-name": r.top()})
		if r.nodes = r.nodes[:len(r.nodes)-1]; len(r.nodes) == 1 {
			r.below = nil
		}
	default:
		r.over, r.now = false, r.image
	}
}
