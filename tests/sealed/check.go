package sealed

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"qblockd/tests/trial"
)

// checkDisk reads the disk through the export.
func (w *world) checkDisk() {
	want := w.top().bytes
	got := make([]byte, len(want))
	for off := 0; off < len(got); off += 1 << 20 {
		if err := w.n.ReadAt(got[off:min(len(got), off+1<<20)], int64(off)); err != nil {
			trial.Fail("reading at %d: %w", off, err)
		}
	}
	trial.Must(trial.Same(got, want, 0))
	l := w.top()
	if l.stale {
		w.forgetBitmaps(l)
	}
	names := w.bitmapNames(l)
	if len(names) != len(l.bitmaps) {
		trial.Fail("the bitmaps are %q, %d should be there", names, len(l.bitmaps))
	}
}

// node is what queries show of a layer.
func (w *world) node(l *layer, into any) {
	var all []json.RawMessage
	trial.Must(json.Unmarshal(w.do("query-named-block-nodes", object{"flat": true}), &all))
	for _, b := range all {
		var name struct {
			Name string `json:"node-name"`
		}
		trial.Must(json.Unmarshal(b, &name))
		if name.Name == l.node {
			trial.Must(json.Unmarshal(b, into))
			return
		}
	}
	trial.Fail("there is no node %s", l.node)
}

// bitmapNames are those of a layer, whose counts have to be right.
func (w *world) bitmapNames(l *layer) (names []string) {
	var n struct {
		Bitmaps []struct {
			Name         string
			Count        int
			Inconsistent bool
		} `json:"dirty-bitmaps"`
	}
	w.node(l, &n)
	for _, b := range n.Bitmaps {
		names = append(names, b.Name)
		want := 0
		for g := range l.bitmaps[b.Name] {
			want += min(granularity, len(l.bytes)-g*granularity)
		}
		off := b.Inconsistent || b.Count < want || b.Count > len(l.bitmaps[b.Name])*granularity
		if l.bitmaps[b.Name] != nil && !l.stale && off {
			trial.Fail("bitmap %s of %s: %d bytes, not %d; inconsistent: %v", b.Name, l.node, b.Count, want, b.Inconsistent)
		}
	}
	return names
}

// bitmap adds one that is kept in the image, or takes one away.
func (w *world) bitmap() {
	l := w.top()
	for name := range l.bitmaps {
		if trial.One(w.r, 2) {
			w.do("block-dirty-bitmap-remove", object{"node": l.node, "name": name})
			delete(l.bitmaps, name)
			return
		}
	}
	if !l.qcow2() || len(l.bitmaps) > 3 {
		return
	}
	w.count++
	name := fmt.Sprint("b", w.count)
	args := object{"node": l.node, "name": name, "granularity": granularity, "persistent": true}
	const why = "Cannot store dirty bitmaps in qcow2 v2 files"
	refusal := fmt.Sprintf("Can't make bitmap '%s' persistent in '%s': %s", name, l.node, why)
	if w.may("block-dirty-bitmap-add", args, refusal) {
		l.bitmaps[name] = map[int]bool{}
	}
}

// merge adds what one bitmap has to another.
func (w *world) merge() {
	l := w.top()
	var names []string
	for name := range l.bitmaps {
		names = append(names, name)
	}
	if len(names) < 2 {
		return
	}
	w.do("block-dirty-bitmap-merge", object{"node": l.node, "target": names[0], "bitmaps": []string{names[1]}})
	for g := range l.bitmaps[names[1]] {
		l.bitmaps[names[0]][g] = true
	}
}

// checkFiles has others look at a chain of images that nobody has open.
func (w *world) checkFiles(chain []*layer) {
	var objects []string
	for id, data := range secrets {
		objects = append(objects, "--object", "secret,id="+id+",data="+data)
	}
	sound := []int{0}
	if w.killed {
		sound = []int{0, 3} // leaks
	}
	for _, img := range []string{"qemu-img", "qemu-img10"} {
		if _, err := exec.LookPath(img); err != nil {
			continue
		}
		var backing any
		for _, l := range chain {
			o := l.options(backing)
			backing = o
			name := "json:" + string(trial.Get(json.Marshal(o)))
			if l.qcow2() {
				run(sound, img, append(append([]string{"check", "-q"}, objects...), name)...)
			}
			if !l.unsure {
				w.compare(img, objects, name, l.bytes)
			}
			for s, want := range l.snapshots {
				if want == nil {
					continue
				}
				args := append([]string{"-l", "snapshot.name=" + s}, objects...)
				trial.In("snapshot "+s, func() { w.compare(img, args, name, want) })
			}
		}
	}
}

// compare reads an image by a program.
func (w *world) compare(img string, args []string, name string, want []byte) {
	out := filepath.Join(w.dir, "out")
	run([]int{0}, img, append(append([]string{"convert", "-O", "raw"}, args...), name, out)...)
	trial.In(img+" reads "+name, func() { trial.Must(trial.Same(trial.Get(os.ReadFile(out)), want, 0)) })
	trial.Must(os.Remove(out))
}
