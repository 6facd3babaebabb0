package crash

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"qblockd/graph/transaction"
	"qblockd/schema/types"
	"qblockd/tests/daemon"
	"qblockd/tests/rig"
)

var (
	flagRounds = flag.Int("crash.rounds", 5, "rounds of kill -9")
	flagJob    = flag.String("crash.job", "", "what runs besides the clients: one of works; empty: by the seed")
	flagSeed   = flag.Uint64("crash.seed", 0, "seed of the first round; 0: by the clock")
)

const (
	diskSize = 16 << 20
	clients  = 4
)

// layers of the chain, lowest first.
var layers = []string{"base", "mid", "top"}

// works are what runs while clients write: jobs, each on the chain that the clients write to,
// snapshots inside its top, or commands on bitmaps of it.
var works = []string{"stream", "rebase", "commit", "active-commit", "mirror", "blocking-mirror", "backup", "snapshots", "bitmaps"}

// killRound is one daemon that is killed.
type killRound struct {
	t    *testing.T
	dir  string
	rnd  *rand.Rand
	lazy bool
	// extended: L2 entries with subclusters; external: data in files of their own.
	extended, external bool
	l                  *ledger
	// before is what the disk showed when the bitmap "all" was made.
	before []uint64
	d      *daemon.Daemon
	how    string
	work   string
	// repair: only opening an image for writing puts its refcounts right.
	repair bool
}

// TestKill kills a daemon under four clients and a job, or snapshots, again and again.
func TestKill(t *testing.T) {
	seed := *flagSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	var leaks, leaky, streaming, acked int
	for i := range *flagRounds {
		s := seed + uint64(i)
		ok := t.Run(fmt.Sprintf("seed=%d", s), func(t *testing.T) {
			r := &killRound{t: t, dir: t.TempDir(), rnd: rand.New(rand.NewPCG(s, 9))}
			n, running, writes := r.play()
			t.Logf("%s: %d requests acknowledged, job running %v, %d leaked clusters", r.how, writes, running, n)
			leaks += n
			acked += writes
			if n > 0 {
				leaky++
			}
			if running {
				streaming++
			}
		})
		if !ok {
			t.Fatalf("again with -crash.rounds=1 -crash.seed=%d", s)
		}
	}
	t.Logf("%d rounds from seed %d: no corruption, nothing flushed lost; %d requests acknowledged; job running at the kill in %d; leaks in %d rounds, %d clusters",
		*flagRounds, seed, acked, streaming, leaky, leaks)
}

// make creates and fills the chain; the ledger begins with what it shows.
func (r *killRound) make() {
	ctx := context.Background()
	x := rig.New(r.dir)
	defer x.Close()
	cs := []uint64{65536, 65536, 4096, 512, 2 << 20}[r.rnd.IntN(5)]
	r.lazy = r.rnd.IntN(4) == 0
	if r.work = *flagJob; r.work == "" {
		r.work = works[r.rnd.IntN(len(works))]
	}
	r.repair = r.lazy || r.work == "snapshots"
	r.extended = cs >= 16<<10 && r.rnd.IntN(2) == 0
	r.external = r.work != "snapshots" && r.rnd.IntN(3) == 0 // they have none
	r.how = fmt.Sprintf("%s, clusters of %d, lazy %v, extended %v, data files %v", r.work, cs, r.lazy, r.extended, r.external)
	values := make([]uint64, diskSize/sector)
	for k, name := range layers {
		o := types.BlockdevCreateOptionsQcow2{ClusterSize: &cs}
		if k > 0 {
			o.BackingFile, o.BackingFmt = &layers[k-1], rig.Ptr(types.BlockdevDriverQcow2)
		}
		r.makeImage(x, name, o)
		if name == "top" {
			break
		}
		r.fill(x, name, k, values)
	}
	if r.hasTarget() {
		r.makeImage(x, "target", types.BlockdevCreateOptionsQcow2{ClusterSize: &cs})
	}
	r.l, r.before = newLedger(len(values), func(i int) uint64 { return values[i] }), values
	if r.work != "bitmaps" {
		return
	}
	o := &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: rig.Ptr("top"),
		U: &types.BlockdevOptionsQcow2{File: x.File("top")}}
	if err := x.Nodes.Add(ctx, o); err != nil {
		r.t.Fatal(err)
	}
	add := x.Nodes.BitmapAdd(&types.BlockDirtyBitmapAdd{Node: "top", Name: "all", Persistent: rig.Ptr(true),
		Granularity: rig.Ptr(uint32(512) << r.rnd.IntN(9))})
	if err := errors.Join(transaction.Run(ctx, x.Graph, add), x.Nodes.Del(ctx, "top")); err != nil {
		r.t.Fatal(err)
	}
}

// makeImage creates an image of the round's kind.
func (r *killRound) makeImage(x *rig.Rig, name string, o types.BlockdevCreateOptionsQcow2) {
	r.t.Helper()
	o.Size, o.LazyRefcounts, o.ExtendedL2 = diskSize, &r.lazy, &r.extended
	if r.external {
		if err := x.MakeFile(name+".data", 0, nil); err != nil {
			r.t.Fatal(err)
		}
		o.DataFile = rig.Ptr(x.File(name + ".data"))
	}
	if err := errors.Join(x.MakeFile(name, 0, nil), x.CreateQcow2(context.Background(), name, o)); err != nil {
		r.t.Fatal(err)
	}
}

// hasTarget tells whether the job copies to an image of its own.
func (r *killRound) hasTarget() bool {
	return r.work == "mirror" || r.work == "blocking-mirror" || r.work == "backup"
}

// fill writes to a layer.
func (r *killRound) fill(x *rig.Rig, name string, k int, values []uint64) {
	ctx := context.Background()
	o := &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: &name,
		U: &types.BlockdevOptionsQcow2{File: x.File(name)}}
	if err := x.Nodes.Add(ctx, o); err != nil {
		r.t.Fatal(err)
	}
	root, err := x.AttachRoot(ctx, x.Graph.Node(name), false)
	if err != nil {
		r.t.Fatal(err)
	}
	const span = 512 // sectors
	for first := 0; first < len(values); first += span {
		if r.rnd.IntN(3) == 0 {
			continue
		}
		p := make([]byte, span*sector)
		for i := range span {
			values[first+i] = 1<<63 | uint64(k)<<32 | uint64(first+i)
			stamp(p[i*sector:], values[first+i])
		}
		if err := write(ctx, root, p, int64(first*sector)); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := errors.Join(x.Graph.CloseRoot(ctx, root), x.Nodes.Del(ctx, name)); err != nil {
		r.t.Fatal(err)
	}
}

// open starts a daemon on the chain.
func (r *killRound) open() *daemon.QMP {
	for _, name := range []string{"pid", "qmp.sock", "nbd.sock"} {
		_ = os.Remove(filepath.Join(r.dir, name)) // a killed daemon leaves them behind
	}
	r.d = daemon.Start(r.t, r.dir)
	q := r.d.Dial(r.t)
	q.Must(r.t, "blockdev-add", daemon.Blockdev("qcow2", "base", map[string]any{
		"file": daemon.File("base"), "read-only": true}))
	q.Must(r.t, "blockdev-add", daemon.Blockdev("qcow2", "mid", map[string]any{
		"file": daemon.File("mid"), "backing": "base", "read-only": true}))
	q.Must(r.t, "blockdev-add", daemon.Blockdev("qcow2", "top", map[string]any{
		"file": map[string]any{"driver": "file", "filename": "top", "discard": "unmap"}, "discard": "unmap", "backing": "mid"}))
	q.Must(r.t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "top", "writable": true, "name": "disk"})
	return q
}

// play is one round. It returns the leaked clusters, whether the job was running at the kill, and
// the requests answered.
func (r *killRound) play() (leaks int, running bool, acked int) {
	r.make()
	q := r.open()
	var wg sync.WaitGroup
	counts := make([]int, clients)
	for i := range clients {
		seed := r.rnd.Uint64()
		c, err := r.d.DialNBD("disk")
		if err != nil {
			r.t.Fatal(err)
		}
		wg.Go(func() { counts[i] = r.client(c, i, rand.New(rand.NewPCG(seed, 2))) })
	}
	r.begin(q)
	// The moment of the kill is what is random here.
	for end := time.Now().Add(time.Duration(5+r.rnd.IntN(300)) * time.Millisecond); time.Now().Before(end); {
		if r.work == "bitmaps" {
			r.bitmapCommand(q)
			continue
		}
		if r.work != "snapshots" {
			time.Sleep(time.Until(end))
			continue
		}
		name := fmt.Sprint(r.rnd.IntN(6))
		if _, err := q.Do("blockdev-snapshot-internal-sync", map[string]any{"device": "top", "name": name}); err != nil {
			q.Must(r.t, "blockdev-snapshot-delete-internal-sync", map[string]any{"device": "top", "name": name})
		}
	}
	var list []json.RawMessage
	if b, err := q.Do("query-jobs", nil); err == nil {
		_ = json.Unmarshal(b, &list)
	}
	if err := r.d.Cmd.Process.Kill(); err != nil {
		r.t.Fatal(err)
	}
	r.d.Ended(time.Minute)
	wg.Wait()
	for _, n := range counts {
		acked += n
	}
	if !r.repair {
		leaks = r.check()
	}
	r.checkBitmaps()
	r.reopen()
	r.checkBitmaps()
	if r.repair {
		leaks = r.check()
	} else {
		r.check()
	}
	return leaks, len(list) > 0, acked
}

// begin starts the job. None of them is told to complete: what clients were told is written is in
// the chain.
func (r *killRound) begin(q *daemon.QMP) {
	args := map[string]any{"job-id": "j", "device": "top", "speed": 4<<20 + r.rnd.Int64N(64<<20)}
	switch r.work {
	case "stream":
		if r.rnd.IntN(2) == 0 {
			args["base-node"] = "base"
		}
		q.Must(r.t, "block-stream", args)
	case "rebase":
		// Onto what the top is over without the layer between, or onto nothing.
		if r.rnd.IntN(2) == 0 {
			args["base-node"] = "base"
		}
		q.Must(r.t, "x-qblockd-rebase", args)
	case "commit":
		args["top-node"] = "mid"
		q.Must(r.t, "block-commit", args)
	case "active-commit":
		if r.rnd.IntN(2) == 0 {
			args["base-node"] = "mid"
		}
		q.Must(r.t, "block-commit", args)
	case "mirror", "blocking-mirror", "backup":
		q.Must(r.t, "blockdev-add", daemon.Blockdev("qcow2", "target", map[string]any{"file": daemon.File("target")}))
		args["target"], args["sync"] = "target", "full"
		if r.work == "backup" {
			q.Must(r.t, "blockdev-backup", args)
			return
		}
		if r.work == "blocking-mirror" {
			args["copy-mode"] = "write-blocking"
		}
		q.Must(r.t, "blockdev-mirror", args)
	}
}

// bitmapCommand does something with the bitmaps of the top but "all".
func (r *killRound) bitmapCommand(q *daemon.QMP) {
	args := map[string]any{"node": "top", "name": fmt.Sprint(r.rnd.IntN(4))}
	switch r.rnd.IntN(6) {
	case 0, 1:
		args["persistent"], args["granularity"], args["disabled"] = r.rnd.IntN(4) > 0, 512<<r.rnd.IntN(10), r.rnd.IntN(2) == 0
		_, _ = q.Do("block-dirty-bitmap-add", args)
	case 2:
		_, _ = q.Do("block-dirty-bitmap-remove", args)
	case 3:
		_, _ = q.Do("block-dirty-bitmap-enable", args)
	case 4:
		_, _ = q.Do("block-dirty-bitmap-disable", args)
	case 5:
		_, _ = q.Do("block-dirty-bitmap-merge", map[string]any{"node": "top", "target": args["name"], "bitmaps": []string{"all"}})
	}
}

// checkBitmaps requires that all persistent bitmaps hold and that what clients have changed is in
// the one that was there from the beginning.
func (r *killRound) checkBitmaps() {
	if r.work != "bitmaps" {
		return
	}
	ctx := context.Background()
	x := rig.New(r.dir)
	defer x.Close()
	o := &types.BlockdevOptions{Driver: types.BlockdevDriverQcow2, NodeName: rig.Ptr("top"), ReadOnly: rig.Ptr(true),
		U: &types.BlockdevOptionsQcow2{File: x.File("top")}}
	if err := x.Nodes.Add(ctx, o); err != nil {
		r.t.Fatal(err)
	}
	n := x.Graph.Node("top")
	for _, b := range n.Bitmaps().States() {
		if b.Inconsistent {
			r.t.Fatalf("bitmap %s does not hold", b.Name)
		}
	}
	all := n.Bitmaps().Find("all")
	if all == nil {
		r.t.Fatal("the bitmap is gone")
	}
	root, err := x.AttachRoot(ctx, n, true)
	if err != nil {
		r.t.Fatal(err)
	}
	p, short := make([]byte, 1<<20), 0
	for off := 0; off < diskSize; off += len(p) {
		if err := read(ctx, root, p, int64(off)); err != nil {
			r.t.Fatal(err)
		}
		for at := 0; at < len(p); at += sector {
			if binary.LittleEndian.Uint64(p[at:]) != r.before[(off+at)/sector] && !all.Bits().Get(int64(off+at)) {
				short++
			}
		}
	}
	if short > 0 {
		r.t.Fatalf("the bitmap misses %d sectors", short)
	}
	if err := errors.Join(x.Graph.CloseRoot(ctx, root), x.Nodes.Del(ctx, "top")); err != nil {
		r.t.Fatal(err)
	}
}

// client writes to every fourth block of 4 KiB until the connection ends.
func (r *killRound) client(c *daemon.NBD, id int, rnd *rand.Rand) (acked int) {
	defer c.Drop()
	const block = 8 // sectors
	blocks := diskSize / sector / block
	var touched []int // blocks written since the last flush
	for {
		b := rnd.IntN(blocks/clients)*clients + id
		if rnd.IntN(3) == 0 { // stay near, so that clusters are shared
			b = rnd.IntN(64)*clients + id
		}
		first := b * block
		var err error
		switch k := rnd.IntN(20); {
		case k == 0:
			if err = c.Flush(); err == nil {
				for _, t := range touched {
					r.l.flushed(t, block)
				}
				touched = touched[:0]
			}
		case k < 3:
			r.l.zero(first, block)
			err = c.Zero(int64(first*sector), block*sector)
			touched = append(touched, first)
		case k == 4:
			if err = c.WriteFUA(r.l.mark(first, block), int64(first*sector)); err == nil {
				r.l.flushed(first, block)
			}
		case k == 5:
			p := make([]byte, block*sector)
			err = c.ReadAt(p, int64(first*sector))
		default:
			err = c.WriteAt(r.l.mark(first, block), int64(first*sector))
			touched = append(touched, first)
		}
		if err != nil {
			return acked
		}
		acked++
	}
}

// reopen starts a daemon on what is left, reads all of it, writes a little, and ends it in order.
func (r *killRound) reopen() {
	q := r.open()
	c, err := r.d.DialNBD("disk")
	if err != nil {
		r.t.Fatal(err)
	}
	p := make([]byte, diskSize)
	for off := 0; off < len(p); off += 1 << 20 {
		if err := c.ReadAt(p[off:off+1<<20], int64(off)); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := r.l.verify(p); err != nil {
		r.t.Fatal(err)
	}
	for range 20 {
		if err := c.WriteAt(make([]byte, 8192), int64(r.rnd.IntN(diskSize/8192)*8192)); err != nil {
			r.t.Fatal(err)
		}
	}
	c.Close()
	q.Must(r.t, "block-export-del", map[string]any{"id": "e", "mode": "hard"})
	r.d.Stop(r.t)
}

// check requires images without corruption and counts what leaked.
func (r *killRound) check() (leaks int) {
	x := rig.New(r.dir)
	defer x.Close()
	images := layers
	if r.hasTarget() && !r.lazy {
		images = append(images[:len(images):len(images)], "target")
	}
	if r.lazy && (r.work == "commit" || r.work == "active-commit") {
		images = []string{"top"} // the others were written to, and opened read-only since
	}
	for _, name := range images {
		res, err := x.Check(context.Background(), name)
		if err != nil || res.Corruptions+res.Errors > 0 {
			r.t.Fatalf("%s: %v %+v", name, err, res)
		}
		leaks += res.Leaks
		if _, err := exec.LookPath("qemu-img"); err != nil {
			r.t.Log("SKIPPED: qemu-img is not installed and does not check the images")
			continue
		}
		cmd := exec.Command("qemu-img", "check", name)
		cmd.Dir = r.dir
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 3 {
			continue // leaks only
		}
		if err != nil {
			r.t.Fatalf("qemu-img check %s: %v\n%s", name, err, out)
		}
	}
	return leaks
}
