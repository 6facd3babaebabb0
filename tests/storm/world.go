package storm

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// config is what a storm depends on.
type config struct {
	binary  string
	seed    uint64
	clients int
	time    time.Duration
	limit   time.Duration  // for one command
	only    *regexp.Regexp // commands
	keep    string         // where the log of a storm that fails goes
}

// world is a daemon in a storm.
type world struct {
	t   *testing.T
	c   config
	d   *daemon.Daemon
	q   *daemon.QMP
	dir string
	h   *history
	log *commandLog

	told map[string]int64 // sizes of images at the end, by file
}

// storm runs one.
func storm(t *testing.T, c config) (commands int) {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, c: c, dir: dir, log: &commandLog{}}
	t.Logf("seed %d", c.seed)
	t.Cleanup(func() {
		if t.Failed() {
			file := filepath.Join(c.keep, fmt.Sprintf("storm-%d.log", c.seed))
			w.log.mu.Lock()
			_ = os.WriteFile(file, w.log.text, 0o600)
			w.log.mu.Unlock()
			t.Logf("what clients said is in %s", file)
		}
	})
	w.d = daemon.StartBinary(t, c.binary, dir)
	w.q = w.d.Dial(t)
	w.setUp()
	w.h = newHistory()
	clients, guests := w.blow()
	if t.Failed() {
		w.dump()
		return 0
	}
	w.calm()
	w.compare(guests)
	w.end()
	done := map[string]int{}
	for _, cl := range clients {
		for name, n := range cl.done {
			done[name] += n
			commands += n
		}
		for name, n := range cl.refused {
			done[name] += 0
			commands += n
		}
	}
	never := slices.DeleteFunc(slices.Sorted(maps.Keys(generators)), func(name string) bool { return done[name] > 0 })
	t.Logf("done: %v; never: %v", done, never)
	return commands
}

func (w *world) must(name string, args M) json.RawMessage {
	w.t.Helper()
	w.q.SetDeadline(time.Now().Add(w.c.limit))
	r, err := w.q.Do(name, anyArgs(args))
	if err != nil {
		w.dump()
		w.t.Fatalf("%s %v: %v", name, args, err)
	}
	return r
}

// job runs one to its end.
func (w *world) job(name string, args M) {
	w.t.Helper()
	args["job-id"] = "setup"
	w.must(name, args)
	w.wait(func() bool {
		var l []struct{ ID, Status, Error string }
		_ = json.Unmarshal(w.must("query-jobs", nil), &l)
		if l[0].Error != "" {
			w.t.Fatalf("%s %v: %s", name, args, l[0].Error)
		}
		return l[0].Status == "concluded"
	})
	w.must("job-dismiss", M{"id": "setup"})
}

func (w *world) wait(f func() bool) {
	w.t.Helper()
	for end := time.Now().Add(w.c.limit); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			w.dump()
			w.t.Fatal("waiting for something that does not come")
		}
	}
}

var images = []string{"d0", "d1", "d2", "d3", "d4", "m0", "m1", "t0", "d5", "d6", "v0", "v1", "fe"}

// sized are the nodes whose sizes are followed.
var sized = []string{"d2", "d5top", "d6top"}

// setUp makes the disks.
func (w *world) setUp() {
	g := &gen{dir: w.dir}
	for _, n := range append(slices.Clone(images), "t1", "y0") {
		if err := os.WriteFile(g.file(n), nil, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, n := range images {
		w.job("blockdev-create", M{"options": M{"driver": "qcow2", "size": diskSize, "file": M{"driver": "file", "filename": g.file(n)}}})
	}
	for _, n := range images[:10] {
		o := g.qcow2(n, n)
		o["file"] = M{"driver": "file", "node-name": n + "-file", "filename": g.file(n)}
		w.must("blockdev-add", o)
	}
	o := g.qcow2("fe", "fe")
	o["file"] = M{"driver": "blkdebug", "image": o["file"], "inject-error": []M{{"event": "write_aio", "iotype": "write", "errno": 5, "once": true}}}
	w.must("blockdev-add", o)
	if err := os.Truncate(g.file("t1"), diskSize); err != nil {
		w.t.Fatal(err)
	}
	w.must("blockdev-add", M{"driver": "raw", "node-name": "t1", "file": M{"driver": "file", "filename": g.file("t1")}})
	w.must("blockdev-add", M{"driver": "raw", "node-name": "d5top", "file": "d5"})
	w.must("blockdev-add", M{"driver": "copy-on-read", "node-name": "d6top", "file": "d6"})
	w.must("blockdev-add", M{"driver": "file", "node-name": "y0", "filename": g.file("y0")})

	w.must("block-export-add", M{"type": "nbd", "id": "setup", "node-name": "d1", "name": "setup", "writable": true})
	n, err := w.d.DialNBD("setup")
	if err != nil {
		w.t.Fatal(err)
	}
	for k, size := range bits {
		src := fmt.Sprint("src", k)
		w.must("block-dirty-bitmap-add", M{"node": "d1", "name": src, "granularity": granule})
		if err := n.WriteAt(make([]byte, size*granule), (1<<k)*granule); err != nil {
			w.t.Fatal(err)
		}
		w.must("block-dirty-bitmap-disable", M{"node": "d1", "name": src})
	}
	n.Close()
	w.must("block-export-del", M{"id": "setup", "mode": "hard"})
	w.wait(func() bool { return string(w.must("query-block-exports", nil)) == "[]" })
	w.must("block-export-add", M{"type": "nbd", "id": "pin", "node-name": "d1", "name": "pin"})
	for _, n := range []string{"gb", "inc"} {
		w.must("block-dirty-bitmap-add", M{"node": "d3", "name": n, "granularity": granule})
	}
	for _, n := range []string{"d0", "d3"} {
		w.must("block-export-add", M{"type": "nbd", "id": n, "node-name": n, "name": n, "writable": true})
	}
}

// blow runs clients and guests for the time of the storm.
func (w *world) blow() (clients []*client, guests []*guest) {
	stop := make(chan struct{})
	var once sync.Once
	end := func() { once.Do(func() { close(stop) }) }
	timer := time.AfterFunc(w.c.time, end)
	defer timer.Stop()
	var wg sync.WaitGroup
	run := func(f func(stop <-chan struct{}) error) {
		wg.Go(func() {
			if err := f(stop); err != nil {
				w.t.Error(err)
				end()
			}
		})
	}
	for i := range w.c.clients {
		c := w.newClient(i)
		clients = append(clients, c)
		run(c.run)
	}
	for _, e := range []string{"d0", "d3"} {
		for i := range int64(2) {
			g := w.newGuest(e, i, 2)
			guests = append(guests, g)
			run(g.run)
		}
	}
	wg.Wait()
	return clients, guests
}

// calm ends all jobs, and the exports that clients have made.
func (w *world) calm() {
	w.wait(func() bool {
		var l []struct{ ID, Status string }
		_ = json.Unmarshal(w.must("query-jobs", nil), &l)
		for _, j := range l {
			w.q.SetDeadline(time.Now().Add(w.c.limit))
			_, _ = w.q.Do("job-cancel", M{"id": j.ID})
			_, _ = w.q.Do("job-dismiss", M{"id": j.ID})
		}
		return len(l) == 0
	})
	w.wait(func() bool {
		type export struct {
			Going bool `json:"shutting-down"`
		}
		var l []export
		_ = json.Unmarshal(w.must("query-block-exports", nil), &l)
		return !slices.ContainsFunc(l, func(e export) bool { return e.Going })
	})
}

type bitmapInfo struct {
	Name  string
	Count int64
	Busy  bool
}

type nodeInfo struct {
	Name    string `json:"node-name"`
	Driver  string `json:"drv"`
	File    string
	Backing string       `json:"backing_file"`
	Bitmaps []bitmapInfo `json:"dirty-bitmaps"`
	Image   struct {
		Size      int64 `json:"virtual-size"`
		Snapshots []struct{ Name string }
		Backing   *struct {
			Size int64 `json:"virtual-size"`
		} `json:"backing-image"`
	}
}

// compare tells what is not as the clients and the guests were told.
func (w *world) compare(guests []*guest) {
	var nodes []nodeInfo
	if err := json.Unmarshal(w.must("query-named-block-nodes", M{"flat": false}), &nodes); err != nil {
		w.t.Fatal(err)
	}
	var exports []struct{ ID string }
	_ = json.Unmarshal(w.must("query-block-exports", nil), &exports)
	exported := func(id string) bool {
		return slices.ContainsFunc(exports, func(x struct{ ID string }) bool { return x.ID == id })
	}
	find := func(name string) *nodeInfo {
		if i := slices.IndexFunc(nodes, func(n nodeInfo) bool { return n.Name == name }); i >= 0 {
			return &nodes[i]
		}
		return nil
	}
	for _, x := range []string{"x0", "x1", "x2"} {
		w.found("node "+x, find(x) != nil)
	}
	for _, e := range []string{"e8", "e9"} {
		w.found("export "+e, exported(e))
	}
	for _, n := range []string{"d1", "d2"} {
		var have []string
		for _, s := range find(n).Image.Snapshots {
			have = append(have, s.Name)
		}
		for _, s := range []string{"s0", "s1", "s2"} {
			w.found(snapObject(n, s), slices.Contains(have, s))
		}
		if slices.Sort(have); len(slices.Compact(slices.Clone(have))) != len(have) {
			w.t.Errorf("snapshots of %s: %v", n, have)
		}
	}
	w.findBitmaps(find("d1"), exported("e8") || exported("e9"))
	sizes := map[string]object{}
	for _, n := range sized {
		w.last("size "+n, step{what: "is", n: find(n).Image.Size, ok: true})
		sizes["size "+n] = object{there: true, n: diskSize}
	}
	for _, err := range w.h.check(sizes) {
		w.t.Error(err)
	}
	w.compareGuests(guests, find("d3"))
	w.told = map[string]int64{}
	for _, n := range nodes {
		if n.Driver == "qcow2" {
			w.told[filepath.Base(n.File)] = n.Image.Size
		}
	}
	// What an overlay shows of the image below it is what that shows itself.
	for _, n := range nodes {
		b := n.Image.Backing
		if size, ok := w.told[filepath.Base(n.Backing)]; b != nil && ok && b.Size != size {
			w.t.Errorf("%s shows %d as the size of its backing file %s, which shows %d", n.Name, b.Size, n.Backing, size)
		}
	}
}

// last takes down what is known of an object at the end.
func (w *world) last(obj string, s step) {
	now := w.h.now()
	w.h.add(w.c.clients, obj, s, now, now+1)
}

func (w *world) found(obj string, there bool) {
	s := step{what: "is not there", ok: true}
	if there {
		s.what = "is there"
	}
	w.last(obj, s)
}

// findBitmaps takes down which of the clients' bitmaps are at d1, and what is in them. used: an
// export may have one.
func (w *world) findBitmaps(d1 *nodeInfo, used bool) {
	for _, b := range []string{"b0", "b1", "b2"} {
		i := slices.IndexFunc(d1.Bitmaps, func(x bitmapInfo) bool { return x.Name == b })
		if i < 0 {
			w.found(bitmapObject(b), false)
			continue
		}
		w.last(bitmapObject(b), step{what: "is", n: d1.Bitmaps[i].Count / granule, ok: true})
		if d1.Bitmaps[i].Busy && !used {
			w.t.Errorf("bitmap %s is in use, by nobody", b)
		}
	}
}

func (w *world) compareGuests(guests []*guest, d3 *nodeInfo) {
	touched, certain := map[int64]bool{}, map[int64]bool{}
	for _, g := range guests {
		if err := g.lookAll(); err != nil {
			w.t.Error(err)
		}
		if g.n != nil {
			g.n.Close()
		}
		if g.export == "d3" {
			maps.Copy(touched, g.touched)
			maps.Copy(certain, g.certain)
		}
	}
	for _, b := range d3.Bitmaps {
		if n := b.Count / granule; b.Name == "gb" && (n < int64(len(certain)) || n > int64(len(touched))) {
			w.t.Errorf("the bitmap of d3 has %d granules; guests wrote to %d", n, len(touched))
		}
	}
}

// end ends the daemon and looks at what it leaves.
func (w *world) end() {
	w.must("nbd-server-stop", nil)
	w.must("nbd-server-start", M{"addr": M{"type": "unix", "data": M{"path": filepath.Join(w.dir, "again.sock")}}})
	w.q.SetDeadline(time.Now().Add(w.c.limit))
	if _, err := w.q.Do("quit", nil); err != nil {
		w.t.Errorf("quit: %v", err)
	}
	if !w.d.Ended(w.c.limit) {
		w.dump()
		w.t.Fatal("the daemon does not end")
	}
	text := w.d.Stderr.String()
	if code := w.d.Cmd.ProcessState.ExitCode(); code != 0 || strings.Contains(text, "DATA RACE") || strings.Contains(text, "goroutine ") {
		w.t.Errorf("the daemon ended with %d and a word", code)
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		w.t.Skip("no qemu-img to check the images with")
	}
	all := append(slices.Clone(images), "o0", "o1", "o2", "q0", "q1", "q2")
	for k := range overlays {
		all = append(all, fmt.Sprint("p", k))
	}
	for _, n := range all {
		if _, err := os.Stat(filepath.Join(w.dir, n)); err != nil {
			continue
		}
		name, _ := json.Marshal(M{"driver": "qcow2", "backing": nil, "file": M{"driver": "file", "filename": filepath.Join(w.dir, n)}})
		out, err := exec.Command("qemu-img", "check", "json:"+string(name)).CombinedOutput()
		switch { // leaks are errors, too: nobody was killed
		case err != nil && strings.Contains(string(out), "Image is not in qcow2 format") && w.log.leftAt(filepath.Join(w.dir, n)):
			// A command that makes an image empties a file that is there, and one whose client
			// leaves does not go on.
			w.t.Logf("%s was not made to the end", n)
		case err != nil && n != "fe": // whose storage fails
			w.t.Errorf("image %s: %v\n%s", n, err, out)
		}
		if told, ok := w.told[n]; ok && n != "fe" {
			w.compareSize(string(name), told)
		}
	}
}

// compareSize requires that an image has the size that was told of it.
func (w *world) compareSize(name string, told int64) {
	out, err := exec.Command("qemu-img", "info", "--output=json", "json:"+name).Output()
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err == nil {
		err = json.Unmarshal(out, &info)
	}
	if err != nil || info.Size != told {
		w.t.Errorf("image %s has %d bytes (%v); %d were told", name, info.Size, err, told)
	}
}

// dump lets a daemon that hangs say where.
func (w *world) dump() {
	if w.d.Ended(0) {
		return
	}
	_ = w.d.Cmd.Process.Signal(syscall.SIGQUIT)
	w.d.Ended(20 * time.Second)
}
