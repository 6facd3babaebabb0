package storm

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"

	"qblockd/tests/trial"
)

// M is a JSON object.
type M = map[string]any

// gen makes commands at random.
type gen struct {
	r   *rand.Rand
	dir string
	// d6, which jobs commit to, only becomes larger: this client makes it so. Zero: another one does.
	larger int64
}

// made is a command and what its success means for objects.
type made struct {
	name  string
	args  M
	steps map[string]step // by object; of a command that succeeds
	// If it fails with a text that ends like this, that says something, too.
	texts texts
}

func (g *gen) pick(l ...string) string { return trial.Pick(g.r, l...) }
func (g *gen) one(n int) bool          { return trial.One(g.r, n) }
func (g *gen) file(name string) string { return filepath.Join(g.dir, name) }

// Names, few of them.
func (g *gen) chain() string  { return g.pick("d0", "o0", "o1", "o2", "m0", "m1") } // what guests of d0 see
func (g *gen) target() string { return g.pick("t0", "t1", "fe") }
func (g *gen) free() string   { return g.pick("t0", "t1", "fe", "v0", "v1", "d4", "x0", "x1", "x2") }
func (g *gen) any() string    { return g.pick(g.chain(), g.free(), "d1", "d2", "d3") }
func (g *gen) job() string    { return g.pick("j0", "j1", "j2", "j3") }
func (g *gen) grown() string  { return g.pick("q0", "q1", "q2") } // overlays of d6
func (g *gen) bitmap() string { return g.pick("b0", "b1", "b2") }
func (g *gen) snap() string   { return g.pick("s0", "s1", "s2") }

// overlays is how many d5 gets at most, one on the other.
const overlays = 16

// bits of the sources src0, src1, src2 of d1: how many granules each has is told by the number of
// what is dirty.
var bits = []int64{1, 2, 4}

func bitmapObject(name string) string     { return "bitmap d1/" + name }
func snapObject(node, name string) string { return "snapshot " + node + "/" + name }
func is(obj, what string) map[string]step { return map[string]step{obj: {what: what, ok: true}} }
func (g *gen) qcow2(node, file string) M {
	return M{"driver": "qcow2", "node-name": node, "backing": nil, "file": M{"driver": "file", "filename": g.file(file)}}
}

// texts is what a refusal means that ends like this.
type texts = map[string]map[string]step

// onJob is a command that names a job, and nothing else.
func onJob(argument string) func(g *gen) made {
	return func(g *gen) made { return made{args: M{argument: g.job()}} }
}

// ask is a query without arguments.
func ask(*gen) made { return made{} }

// size makes a command that says how large a node is to be.
func size(node string, n int64) made {
	return made{args: M{"node-name": node, "size": n}, steps: map[string]step{"size " + node: {what: "size", n: n, ok: true}}}
}

// generators make the commands of the schema that change something.
var generators = map[string]func(g *gen) made{
	"blockdev-add": func(g *gen) made {
		switch g.r.IntN(5) {
		case 0:
			v := g.pick("v0", "v1")
			return made{args: g.qcow2(v, v)}
		case 4:
			copy := M{"driver": "null-co", "size": diskSize, "read-zeroes": true}
			return made{args: M{"driver": "quorum", "node-name": "vote", "vote-threshold": 1, "children": []M{copy, copy}}}
		case 1:
			return made{args: M{"driver": "raw", "node-name": g.pick("x0", "x1", "x2") + "r", "file": g.free()}}
		}
		x := g.pick("x0", "x1", "x2")
		return made{args: M{"driver": "null-co", "node-name": x, "size": diskSize}, steps: is("node "+x, "make"),
			texts: texts{"Duplicate nodes with node-name='" + x + "'": is("node "+x, "is there")}}
	},
	"blockdev-del": func(g *gen) made {
		if g.one(3) {
			return made{args: M{"node-name": g.pick("vote", "v0", "v1", "x0r", "x1r", "x2r", "o0", "o1", "m0", "m1", g.grown(), g.grown())}}
		}
		x := g.pick("x0", "x1", "x2")
		return made{args: M{"node-name": x}, steps: is("node "+x, "drop"),
			texts: texts{"Failed to find node with node-name='" + x + "'": is("node "+x, "is not there")}}
	},
	"x-blockdev-change": func(g *gen) made {
		a := M{"parent": g.pick("vote", "vote", "vote", g.any())}
		if g.one(2) {
			a["node"] = g.pick("x0", "x1", "x2", g.any())
		} else {
			a["child"] = g.pick("children.0", "children.1", "children.2", "children.3")
		}
		return made{args: a}
	},
	"blockdev-set-active": func(g *gen) made {
		if g.one(3) {
			return made{args: M{"node-name": g.any(), "active": true}}
		}
		// Not v0, v1 and vote: d1 may be below them, and has no bitmaps while it is inactive.
		return made{args: M{"node-name": g.pick("x0", "x1", "x0r", "x1r"), "active": g.one(2)}}
	},
	"blockdev-reopen": func(g *gen) made {
		var l []M
		for range 1 + g.r.IntN(2) {
			n := g.pick("d1", "d1", "d2", "d3", "d0")
			o := g.qcow2(n, n)
			o["file"] = n + "-file"
			o["cache-size"] = 1 << (17 + g.r.IntN(5))
			if g.one(3) {
				o["file"] = M{"driver": "file", "node-name": n + "-file", "filename": g.file(n), "cache": M{"no-flush": g.one(2)}}
			}
			if g.one(4) {
				o = M{"driver": "file", "node-name": n + "-file", "filename": g.file(n), "cache": M{"no-flush": g.one(2)}}
			}
			if g.one(6) && (n == "d1" || n == "d2") {
				o["read-only"] = true
			}
			l = append(l, o)
		}
		return made{args: M{"options": l}}
	},
	"block_resize": func(g *gen) made {
		if other := g.any(); g.one(3) && other != "d2" {
			return made{args: M{"node-name": other, "size": diskSize}}
		}
		if g.larger > 0 && g.one(2) {
			g.larger += granule
			return size("d6top", g.larger)
		}
		n := int64(1+g.r.IntN(8)) << 20
		if g.one(3) {
			return size("d5top", n)
		}
		return size("d2", n)
	},
	"block-set-write-threshold": func(g *gen) made { return made{args: M{"node-name": g.any(), "write-threshold": g.r.IntN(diskSize)}} },
	"x-blockdev-set-iothread": func(g *gen) made {
		var io any
		if g.one(2) {
			io = g.pick("ob0", "ob1")
		}
		return made{args: M{"node-name": g.any(), "iothread": io, "force": g.one(2)}}
	},
	"blockdev-create": func(g *gen) made {
		if g.one(2) {
			return made{args: M{"job-id": g.job(), "options": M{"driver": "file", "filename": g.file("y0"), "size": 1 << 20}}}
		}
		return made{args: M{"job-id": g.job(), "options": M{"driver": "qcow2", "file": "y0", "size": 1 << 20}}}
	},
	"x-blockdev-amend": func(g *gen) made {
		return made{args: M{"job-id": g.job(), "node-name": g.any(), "options": M{"driver": "qcow2"}}}
	},
	"x-qblockd-check": func(g *gen) made {
		return made{args: M{"job-id": g.job(), "node-name": g.any(), "repair": g.pick("none", "leaks", "all")}}
	},

	"block-dirty-bitmap-add": func(g *gen) made {
		if g.one(3) {
			return made{args: M{"node": g.any(), "name": "b9", "persistent": g.one(2)}}
		}
		b := g.bitmap()
		return made{args: M{"node": "d1", "name": b, "persistent": g.one(2), "granularity": granule, "disabled": g.one(2)}, steps: is(bitmapObject(b), "make"),
			texts: texts{"Bitmap already exists: " + b: is(bitmapObject(b), "is there")}}
	},
	"block-dirty-bitmap-remove":  func(g *gen) made { return g.onBitmap("drop") },
	"block-dirty-bitmap-clear":   func(g *gen) made { return g.onBitmap("clear") },
	"block-dirty-bitmap-enable":  func(g *gen) made { return g.onBitmap("is there") },
	"block-dirty-bitmap-disable": func(g *gen) made { return g.onBitmap("is there") },
	"block-dirty-bitmap-merge": func(g *gen) made {
		if g.one(3) {
			return made{args: M{"node": g.any(), "target": "b9", "bitmaps": []any{M{"node": g.any(), "name": "b9"}, M{"node": "d3", "name": "gb"}}}}
		}
		m, k := g.onBitmap("merge"), g.r.IntN(len(bits))
		m.args["target"] = m.args["name"]
		delete(m.args, "name")
		m.args["bitmaps"] = []any{fmt.Sprint("src", k)}
		for o := range m.steps {
			m.steps[o] = step{what: "merge", n: bits[k], ok: true}
		}
		return m
	},
	"x-debug-block-dirty-bitmap-sha256": func(g *gen) made { return g.onBitmap("is") },

	"blockdev-snapshot-internal-sync": func(g *gen) made {
		n, s := g.pick("d1", "d1", "d2"), g.snap()
		if g.one(5) {
			n = g.any()
		}
		m := made{args: M{"device": n, "name": s}}
		if n == "d1" || n == "d2" {
			m.steps = is(snapObject(n, s), "make")
			m.texts = texts{"Snapshot with name '" + s + "' already exists on device '" + n + "'": is(snapObject(n, s), "is there")}
		}
		return m
	},
	"blockdev-snapshot-delete-internal-sync": func(g *gen) made {
		n, s := g.pick("d1", "d1", "d2"), g.snap()
		return made{args: M{"device": n, "name": s}, steps: is(snapObject(n, s), "drop"), texts: texts{
			"Snapshot with id 'null' and name '" + s + "' does not exist on device '" + n + "'": is(snapObject(n, s), "is not there")}}
	},
	"x-qblockd-snapshot-apply": func(g *gen) made {
		return made{args: M{"device": g.pick("d1", "d2", g.any()), "name": "none"}} // the contents of the others are known
	},
	"x-qblockd-measure": func(g *gen) made {
		if g.one(2) {
			return made{args: M{"driver": "qcow2", "node-name": g.any()}}
		}
		return made{args: M{"driver": g.pick("raw", "qcow2", "luks", "file"), "size": 1 << 30}}
	},
	"blockdev-snapshot-sync": func(g *gen) made {
		if g.one(3) {
			q := g.grown()
			return made{args: M{"node-name": g.pick("d6", g.grown()), "snapshot-node-name": q, "snapshot-file": g.file(q)}}
		}
		if k := g.r.IntN(overlays); g.one(2) {
			n := "d5"
			if k > 0 {
				n = fmt.Sprint("p", k-1)
			}
			p := fmt.Sprint("p", k)
			return made{args: M{"node-name": n, "snapshot-node-name": p, "snapshot-file": g.file(p)}}
		}
		o := g.pick("o0", "o1", "o2")
		return made{args: M{"node-name": g.pick("d0", g.chain(), "d4", "t0"), "snapshot-node-name": o, "snapshot-file": g.file(o)}}
	},
	"blockdev-snapshot": func(g *gen) made { return made{args: M{"node": g.free(), "overlay": g.pick("v0", "v1")}} },

	"transaction": nil, // is made of others

	"blockdev-backup": func(g *gen) made {
		a := g.jobArgs(M{"device": g.pick(g.any(), "d3", "d1"), "target": g.target(), "sync": g.pick("full", "top", "none")})
		if g.one(2) {
			a["device"], a["sync"], a["bitmap"] = "d3", "incremental", "inc"
		} else if g.one(2) {
			a["device"], a["sync"], a["bitmap"], a["bitmap-mode"] = "d1", "bitmap", g.bitmap(), "never"
		}
		if a["device"] != "d1" && a["device"] != "d2" {
			a["target"] = g.pick("t0", "t1") // where copying before guests' writes does not fail: those would
		}
		if g.one(8) {
			a["discard-source"] = true
		}
		return made{args: a}
	},
	"drive-backup": func(g *gen) made {
		return made{args: g.jobArgs(M{"device": g.any(), "target": g.file(g.pick("f0", "f1")), "format": g.pick("raw", "qcow2"), "sync": "full"})}
	},
	"blockdev-mirror": func(g *gen) made {
		a := M{"device": g.pick("d1", "d2", "d4"), "target": g.target(), "sync": "full"}
		if g.one(2) {
			a = M{"device": g.chain(), "target": g.pick("m0", "m1"), "sync": "full", "copy-mode": g.pick("background", "write-blocking")}
		}
		return made{args: g.jobArgs(a)}
	},
	"drive-mirror": func(g *gen) made {
		return made{args: g.jobArgs(M{"device": g.pick("d2", "d4", "t0"), "target": g.file(g.pick("f0", "f1")), "format": "qcow2", "sync": "full"})}
	},
	"block-stream": func(g *gen) made {
		a := M{"device": g.pick(g.chain(), "v0", "v1")}
		if g.one(3) {
			return g.onGrown(false)
		}
		if g.one(2) {
			a["base-node"] = g.chain()
		}
		return made{args: g.jobArgs(a)}
	},
	"x-qblockd-rebase": func(g *gen) made {
		a := M{"device": g.pick("v0", "v1")}
		if !g.one(4) {
			// Only what nobody keeps account of: a commit writes into a base and changes its size, and
			// it can be made inactive together with what is above it.
			a["base-node"] = g.free()
		}
		return made{args: g.jobArgs(a)}
	},
	"block-commit": func(g *gen) made {
		if g.one(2) {
			return g.onGrown(true)
		}
		a := M{"device": g.pick(g.chain(), "v0", "v1")}
		if g.one(2) {
			a["base-node"] = g.chain()
		}
		if g.one(2) {
			a["top-node"] = g.chain()
		}
		return made{args: g.jobArgs(a)}
	},
	"change-backing-file": func(g *gen) made {
		o := g.pick("o0", "o1", "o2")
		return made{args: M{"device": g.chain(), "image-node-name": o, "backing-file": g.file(g.pick("d0", "o0", "o1"))}}
	},

	"block-job-cancel": func(g *gen) made { return made{args: M{"device": g.job(), "force": g.one(2)}} },
	"job-pause":        onJob("id"), "job-resume": onJob("id"), "job-cancel": onJob("id"), "job-complete": onJob("id"),
	"job-finalize": onJob("id"), "job-dismiss": onJob("id"), "block-job-finalize": onJob("id"), "block-job-dismiss": onJob("id"),
	"block-job-pause": onJob("device"), "block-job-resume": onJob("device"), "block-job-complete": onJob("device"),
	"block-job-set-speed": func(g *gen) made {
		return made{args: M{"device": g.job(), "speed": g.r.IntN(2) * (1 << 20)}}
	},
	"block-job-change": func(g *gen) made {
		return made{args: M{"id": g.job(), "type": "mirror", "copy-mode": g.pick("background", "write-blocking")}}
	},

	"block-export-add": func(g *gen) made {
		e := g.pick("e8", "e9")
		a := M{"type": "nbd", "id": e, "name": e, "node-name": g.any()}
		if g.one(3) {
			a["node-name"], a["bitmaps"] = "d1", []any{g.bitmap()}
		}
		return made{args: a, steps: is("export "+e, "make")} // an id can be in use by one that is about to fail
	},
	"block-export-del": func(g *gen) made { // that it is gone is told by an event: some time after the command
		e := g.pick("e8", "e9")
		return made{args: M{"id": e, "mode": g.pick("hard", "safe")}, steps: map[string]step{"export " + e: {what: "drop"}}}
	},
	"x-qblockd-export-resume": func(g *gen) made { return made{args: M{"id": g.pick("e8", "e9")}} },

	"nbd-server-add":    func(g *gen) made { return made{args: M{"device": g.free()}} },
	"nbd-server-remove": func(g *gen) made { return made{args: M{"name": g.free(), "mode": "hard"}} },

	"object-add": func(g *gen) made {
		return made{args: M{"qom-type": g.pick("iothread", "throttle-group"), "id": g.pick("ob0", "ob1")}}
	},
	"object-del": func(g *gen) made { return made{args: M{"id": g.pick("ob0", "ob1")}} },
	"qom-set": func(g *gen) made {
		return made{args: M{"path": "/objects/" + g.pick("ob0", "ob1"), "property": "x-iops-total", "value": g.r.IntN(1000)}}
	},
	"chardev-add": func(g *gen) made {
		return made{args: M{"id": g.pick("c0", "c1"), "backend": M{"type": "ringbuf", "data": M{}}}}
	},
	"chardev-change": func(g *gen) made {
		return made{args: M{"id": g.pick("c0", "c1"), "backend": M{"type": "null", "data": M{}}}}
	},
	"chardev-remove":     func(g *gen) made { return made{args: M{"id": g.pick("c0", "c1")}} },
	"chardev-send-break": func(g *gen) made { return made{args: M{"id": g.pick("c0", "c1")}} },
	"ringbuf-write":      func(g *gen) made { return made{args: M{"device": g.pick("c0", "c1"), "data": "x"}} },
	"ringbuf-read":       func(g *gen) made { return made{args: M{"device": g.pick("c0", "c1"), "size": 10}} },

	// Queries see what is half done, and must not mind.
	"query-named-block-nodes": func(g *gen) made { return made{args: M{"flat": g.one(2)}} },
	"query-blockstats":        func(*gen) made { return made{args: M{"query-nodes": true}} },
	"qom-list":                func(*gen) made { return made{args: M{"path": "/objects"}} },
	"qom-get": func(g *gen) made {
		return made{args: M{"path": "/objects/" + g.pick("ob0", "ob1"), "property": "type"}}
	},
	"query-block": ask, "query-jobs": ask, "query-block-jobs": ask, "query-block-exports": ask, "query-chardev": ask,
	"x-debug-query-block-graph": ask,
}

// generate makes a command.
func (g *gen) generate(name string) made {
	if f := generators[name]; f != nil {
		return f(g)
	}
	return g.transaction()
}

// leftOut are the commands that clients of a storm do not send.
var leftOut = map[string]string{
	"qmp_capabilities":       "sent once by each client",
	"quit":                   "how each storm ends",
	"nbd-server-stop":        "ends all guests: after the storm",
	"nbd-server-start":       "after the storm, as the server runs meanwhile",
	"query-chardev-backends": "shows what never changes",
	"query-commands":         "shows what never changes",
	"query-qmp-schema":       "shows what never changes",
	"query-version":          "shows what never changes",
	"qom-list-properties":    "shows what never changes",
	"qom-list-types":         "shows what never changes",
}

// weights of commands that are sent more often than once in a while.
var weights = map[string]int{
	"block-dirty-bitmap-add": 6, "block-dirty-bitmap-remove": 4, "block-dirty-bitmap-clear": 4, "block-dirty-bitmap-merge": 8, "x-debug-block-dirty-bitmap-sha256": 6,
	"blockdev-snapshot-internal-sync": 8, "blockdev-snapshot-delete-internal-sync": 8, "block_resize": 8, "blockdev-reopen": 8, "transaction": 12,
	"blockdev-add": 6, "blockdev-del": 6, "x-blockdev-change": 6, "block-export-add": 4, "block-export-del": 4, "blockdev-backup": 10, "blockdev-mirror": 6, "block-stream": 4, "x-qblockd-rebase": 4, "block-commit": 8,
	"blockdev-snapshot-sync": 8, "job-complete": 4, "block-job-complete": 4, "job-finalize": 4, "job-dismiss": 6, "job-cancel": 4, "block-job-cancel": 4, "query-named-block-nodes": 4,
}

func (g *gen) jobArgs(a M) M {
	a["job-id"] = g.job()
	if g.one(4) {
		a["auto-finalize"] = false
	}
	if g.one(6) {
		a["auto-dismiss"] = false
	}
	if g.one(3) {
		a["speed"] = 1 << 20
	}
	return a
}

// onGrown is a job on the overlays of d6, by the filter above them.
func (g *gen) onGrown(top bool) made {
	a := M{"device": "d6top"}
	if top && g.one(2) {
		a["top-node"] = g.grown()
	}
	if g.one(2) {
		a["base-node"] = g.pick("d6", g.grown())
	}
	return made{args: g.jobArgs(a)}
}

// onBitmap is a command on a bitmap of d1; now and then on one elsewhere.
func (g *gen) onBitmap(what string) made {
	if g.one(5) {
		return made{args: M{"node": g.any(), "name": "b9"}}
	}
	b := g.bitmap()
	return made{args: M{"node": "d1", "name": b}, steps: is(bitmapObject(b), what),
		texts: texts{"Dirty bitmap '" + b + "' not found": is(bitmapObject(b), "is not there")}}
}

// steps of a transaction, by the name that they have there.
var transactionSteps = []string{
	"block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-clear", "block-dirty-bitmap-enable", "block-dirty-bitmap-disable", "block-dirty-bitmap-merge",
	"block-dirty-bitmap-merge", "block-dirty-bitmap-clear", "blockdev-snapshot-internal-sync", "blockdev-snapshot-internal-sync", "blockdev-backup", "blockdev-snapshot-sync", "blockdev-snapshot",
}

func (g *gen) transaction() made {
	all := made{steps: map[string]step{}}
	var l []M
	for range 1 + g.r.IntN(4) {
		name := g.pick(transactionSteps...)
		m := generators[name](g)
		same := false
		for o := range m.steps {
			_, has := all.steps[o]
			same = same || has
		}
		if same {
			continue // one step for an object: the model does not know their order
		}
		maps.Copy(all.steps, m.steps)
		l = append(l, M{"type": name, "data": m.args})
	}
	if g.one(3) {
		at := g.r.IntN(len(l) + 1)
		l = slices.Insert(l, at, M{"type": "abort", "data": M{}})
		all.steps = nil
	}
	all.args = M{"actions": l}
	return all
}
