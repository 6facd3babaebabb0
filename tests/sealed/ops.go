package sealed

import (
	"fmt"

	"qblockd/tests/trial"
)

// op is something that is done to a chain.
type op struct {
	name   string
	weight int
	do     func(w *world)
}

var ops = []op{
	{"write", 8, (*world).write}, {"zero", 3, (*world).zero}, {"overlay", 3, (*world).overlay},
	{"resize", 3, (*world).resize}, {"commit", 3, (*world).commit}, {"stream", 2, (*world).stream},
	{"mirror", 2, (*world).mirror}, {"backup", 1, (*world).backup}, {"inside", 2, (*world).inside},
	{"rekey", 2, (*world).rekey}, {"bitmap", 2, (*world).bitmap}, {"merge", 1, (*world).merge},
	{"restart", 2, (*world).restart}, {"kill", 2, (*world).kill}, {"kill a commit", 2, (*world).killCommit},
}

// kinds are those of images that can be the lowest, and those that go over others.
var (
	kinds    = []string{"raw", "luks", "qcow2", "sealed", "sealed", "aes"}
	overlays = []string{"qcow2", "sealed", "sealed", "aes"}
)

const (
	sector = 512
	most   = 3 << 20 // the longest disk, in bytes
)

// someSize is the length of a disk.
func (w *world) someSize() int { return (1 + w.r.IntN(most/sector)) * sector }

// span is a part of the disk that begins and ends anywhere, often at sectors.
func (w *world) span() (off, n int) {
	size := len(w.top().bytes)
	off = w.r.IntN(size)
	n = 1 + w.r.IntN(min(size-off, 1<<w.r.IntN(21)))
	if trial.One(w.r, 2) {
		off = off / sector * sector
		n = min((n+sector-1)/sector*sector, size-off)
	}
	return off, n
}

// touch notes that a part of the disk changes.
func (w *world) touch(off, n int) {
	for _, b := range w.top().bitmaps {
		for g := off / granularity; g <= (off+n-1)/granularity; g++ {
			b[g] = true
		}
	}
}

func (w *world) write() {
	for range 1 + w.r.IntN(8) {
		off, n := w.span()
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(w.r.Uint32())
		}
		w.put(off, p)
	}
}

func (w *world) put(off int, p []byte) {
	if err := w.n.WriteAt(p, int64(off)); err != nil {
		trial.Fail("writing %d bytes at %d: %w", len(p), off, err)
	}
	copy(w.top().bytes[off:], p)
	w.touch(off, len(p))
}

func (w *world) zero() {
	off, n := w.span()
	f := w.n.Zero
	if trial.One(w.r, 2) {
		f = w.n.ZeroNoHole
	}
	if err := f(int64(off), n); err != nil {
		trial.Fail("zeroing %d bytes at %d: %w", n, off, err)
	}
	clear(w.top().bytes[off : off+n])
	w.touch(off, n)
}

// overlay takes a snapshot.
func (w *world) overlay() {
	if len(w.chain) > 5 {
		return
	}
	below := w.top()
	l := w.create(trial.Pick(w.r, overlays...), len(below.bytes))
	w.add(l, nil, false)
	w.do("blockdev-snapshot", object{"node": below.node, "overlay": l.node})
	copy(l.bytes, below.bytes)
	w.chain = append(w.chain, l)
}

// resize makes the disk longer or shorter. What a luks disk has behind its old end is noise.
func (w *world) resize() {
	l, size := w.top(), w.someSize()
	old := len(l.bytes)
	if len(l.snapshots) > 0 && l.qcow2() {
		return // refused for some
	}
	if len(l.bitmaps) > 0 {
		return
	}
	w.unexport() // exports do not share resizing
	args := object{"node-name": l.node, "size": size}
	// Version 2 has nothing to hide a longer backing file with.
	done := w.may("block_resize", args, "Failed to zero out new clusters: Operation not supported")
	if done {
		l.bytes = trial.Resized(l.bytes, size)
	}
	w.export()
	if l.kind == "luks" && done && size > old {
		w.put(old, make([]byte, size-old))
	}
}

// drop deletes nodes that have left the chain.
func (w *world) drop(gone []*layer) {
	for i := len(gone) - 1; i >= 0; i-- {
		w.do("blockdev-del", object{"node-name": gone[i].node})
	}
}

// pair is two layers of the chain, ok if there are.
func (w *world) pair() (base, top int, ok bool) {
	if len(w.chain) < 2 {
		return 0, 0, false
	}
	base = w.r.IntN(len(w.chain) - 1)
	return base, base + 1 + w.r.IntN(len(w.chain)-1-base), true
}

// committed is what base is when top was committed into it.
func committed(base, top *layer) []byte {
	b := trial.Resized(base.bytes, max(len(base.bytes), len(top.bytes)))
	copy(b, top.bytes)
	return b
}

// commit puts layers into one below.
func (w *world) commit() {
	b, t, ok := w.pair()
	if !ok {
		return
	}
	base, top := w.chain[b], w.chain[t]
	if len(base.snapshots) > 0 && len(base.bytes) < len(top.bytes) && base.qcow2() {
		return // it may not grow
	}
	id, args := w.job(object{"device": w.top().node, "base-node": base.node, "top-node": top.node})
	active := top == w.top()
	w.do("block-commit", args)
	if active {
		trial.Must(w.await(id, "ready"))
		w.do("job-complete", object{"id": id})
	}
	w.finish(id)
	base.bytes, base.unsure = committed(base, top), false
	base.stale = true
	gone := append([]*layer(nil), w.chain[b+1:t+1]...)
	w.chain = append(w.chain[:b+1], w.chain[t+1:]...)
	if w.drop(gone); active {
		w.unexport() // an export keeps its size
		w.export()
	}
}

// forgetBitmaps takes those of a layer away.
func (w *world) forgetBitmaps(l *layer) {
	for _, name := range w.bitmapNames(l) {
		w.do("block-dirty-bitmap-remove", object{"node": l.node, "name": name})
	}
	l.bitmaps, l.stale = map[string]map[int]bool{}, false
}

// stream puts layers into the uppermost.
func (w *world) stream() {
	if len(w.chain) < 2 {
		return
	}
	top := w.top()
	b := w.r.IntN(len(w.chain)) - 1 // -1: without base
	if b == len(w.chain)-2 {
		return
	}
	more := object{"device": top.node}
	if b >= 0 {
		more["base-node"] = w.chain[b].node
	}
	id, args := w.job(more)
	w.do("block-stream", args)
	w.finish(id)
	top.loseSnapshots()
	gone := append([]*layer(nil), w.chain[b+1:len(w.chain)-1]...)
	w.chain = append(w.chain[:b+1], top)
	w.drop(gone)
}

// mirror goes over to another image.
func (w *world) mirror() {
	top := w.top()
	l := w.create(trial.Pick(w.r, kinds...), len(top.bytes))
	w.add(l, nil, false)
	id, args := w.job(object{"device": top.node, "target": l.node, "sync": "full"})
	w.do("blockdev-mirror", args)
	w.write()
	trial.Must(w.await(id, "ready"))
	w.write()
	w.do("job-complete", object{"id": id})
	w.finish(id)
	copy(l.bytes, top.bytes)
	gone := w.chain
	w.chain = []*layer{l}
	w.drop(gone)
	w.dial()
}

// backup makes a copy, which nobody goes over to.
func (w *world) backup() {
	top := w.top()
	l := w.create(trial.Pick(w.r, kinds...), len(top.bytes))
	w.add(l, nil, false)
	copy(l.bytes, top.bytes)
	id, args := w.job(object{"device": top.node, "target": l.node, "sync": "full"})
	w.do("blockdev-backup", args)
	w.write()
	w.finish(id)
	w.drop([]*layer{l})
	w.checkFiles([]*layer{l})
}

// inside takes a snapshot within the image, or deletes one.
func (w *world) inside() {
	l := w.top()
	if !l.qcow2() {
		return
	}
	for name := range l.snapshots {
		if trial.One(w.r, 2) {
			w.do("blockdev-snapshot-delete-internal-sync", object{"device": l.node, "name": name})
			delete(l.snapshots, name)
			return
		}
	}
	w.count++
	name := fmt.Sprint("s", w.count)
	w.do("blockdev-snapshot-internal-sync", object{"device": l.node, "name": name})
	l.snapshots[name] = append([]byte(nil), l.bytes...)
}

// rekey has another password open the image, and the old one no more.
func (w *world) rekey() {
	l := w.top()
	next := fmt.Sprint("k", w.r.IntN(len(secrets)))
	if l.kind != "luks" && l.kind != "sealed" || next == l.secret {
		return
	}
	w.amend(l, object{"state": "active", "new-secret": next, "secret": l.secret, "iter-time": 1})
	w.amend(l, object{"state": "inactive", "old-secret": l.secret})
	l.secret = next
}

func (w *world) amend(l *layer, o object) {
	o["driver"] = "luks"
	if l.kind == "sealed" {
		delete(o, "driver")
		o["format"] = "luks"
		o = object{"driver": "qcow2", "encrypt": o}
	}
	w.count++
	id := fmt.Sprint("a", w.count)
	w.do("x-blockdev-amend", object{"job-id": id, "node-name": l.node, "options": o})
	w.finish(id)
}

// restart ends the daemon in order and begins anew.
func (w *world) restart() {
	w.stop(false)
	w.checkFiles(w.chain)
	w.start()
	w.open()
}

// kill kills the daemon when all is stable. Bitmaps are no longer good then.
func (w *world) kill() {
	trial.Must(w.n.Flush())
	w.again()
}

func (w *world) again() {
	w.killed = true
	w.stop(true)
	w.start()
	w.open()
	for _, l := range w.chain {
		l.stale = true
	}
}

// loseSnapshots: what the snapshots within an image do not hold themselves comes from below, as it
// is now.
func (l *layer) loseSnapshots() {
	for s := range l.snapshots {
		l.snapshots[s] = nil
	}
}

// killCommit kills the daemon in the middle of a commit. What the chain shows stays the same; the
// base is somewhere in between.
func (w *world) killCommit() {
	b, t, ok := w.pair()
	if !ok {
		return
	}
	base, top := w.chain[b], w.chain[t]
	if len(base.snapshots) > 0 && len(base.bytes) < len(top.bytes) && base.qcow2() {
		return
	}
	trial.Must(w.n.Flush())
	_, args := w.job(object{"device": w.top().node, "base-node": base.node, "top-node": top.node,
		"speed": 1 + w.r.IntN(1<<20)})
	w.do("block-commit", args)
	for _, l := range w.chain[b:t] {
		l.unsure = true
	}
	for _, l := range w.chain[b+1 : t+1] {
		l.loseSnapshots()
	}
	w.again()
	var n struct {
		Image struct {
			Size int `json:"virtual-size"`
		}
	}
	w.node(base, &n)
	base.bytes = trial.Resized(base.bytes, n.Image.Size)
}
