package hostile

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"sync"
	"time"

	"qblockd/tests/daemon"
)

type args = map[string]any

// event waits for an event about an export or job.
func (r *run) event(name, id string) error {
	r.q.SetDeadline(time.Now().Add(r.s.limits.Deadline))
	for {
		e, err := r.q.Next()
		if err != nil {
			return &Failure{"no event " + name, err.Error(), true}
		}
		var d struct{ ID string }
		if json.Unmarshal(e.Data, &d) == nil && e.Name == name && d.ID == id {
			return nil
		}
	}
}

// empty: nothing of the case is left in the daemon.
func (r *run) empty() error {
	ret, _, err := r.do("query-named-block-nodes", args{"flat": true})
	if err != nil {
		return err
	}
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := json.Unmarshal(ret, &nodes); err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Name != "healthy" && n.Name != "healthyfile" {
			return &Failure{"a node stays", n.Name, true}
		}
	}
	return nil
}

// mostAnswer is the longest answer to a query: 65535 snapshots of a node, of its overlay and in the
// chain of that are long.
const mostAnswer = 64 << 20

// query asks for everything there is to know.
func (r *run) query() error {
	for _, c := range []struct {
		name string
		args any
	}{{"query-named-block-nodes", nil}, {"query-block", nil}, {"x-debug-query-block-graph", nil}, {"query-blockstats", args{"query-nodes": true}}} {
		ret, refused, err := r.do(c.name, c.args)
		if err != nil {
			return err
		}
		if refused != nil {
			return &Failure{"a query fails", c.name + ": " + refused.Desc, false}
		}
		if len(ret) > mostAnswer {
			return &Failure{"a long answer", fmt.Sprintf("%s: %d bytes", c.name, len(ret)), false}
		}
	}
	return nil
}

// mostStatus bounds how often one status of a disk is asked for, whatever its size.
const mostStatus = 40

// status asks for the status of the whole disk, as far as that goes.
func (r *run) status() error {
	s, err := daemon.DialStatus(r.s.nbd(), "x", time.Now().Add(r.s.limits.Deadline), "base:allocation", "qemu:allocation-depth",
		"qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2")
	if err != nil {
		r.note("status: %v", err)
		if os.IsTimeout(err) {
			return &Failure{"no answer to connect", err.Error(), true}
		}
		return nil
	}
	defer s.Drop()
	off := int64(0)
	for i := 0; i < mostStatus && off < s.Size; i++ {
		n := min(s.Size-off, 1<<31)
		s.SetDeadline(time.Now().Add(r.s.limits.Deadline))
		m, err := s.Ask(off, n)
		switch {
		case os.IsTimeout(err):
			return &Failure{"no answer to status", fmt.Sprintf("at %d", off), true}
		case err != nil:
			r.note("status at %d: %v", off, err)
			off += n
			continue
		}
		step := int64(0)
		for _, l := range m {
			var sum int64
			for _, e := range l {
				sum += int64(e.Length)
			}
			if step == 0 || sum < step {
				step = sum
			}
		}
		if step == 0 {
			return &Failure{"an empty status", fmt.Sprintf("at %d", off), false}
		}
		off += step
	}
	r.note("status: %d of %d bytes", off, s.Size)
	return nil
}

// ignore tells whether nothing can be expected of a sector: the entry that leads to it cannot be
// followed.
func (r *run) ignore(off int64) bool { return r.rep.At(off) >= Unusable }

// readAll reads the probes. With learn what is read is taken as right, else it is compared. With
// later the disk was closed in between.
func (r *run) readAll(learn, later bool) error {
	if ok, err := r.request("read all", func(n *daemon.NBD) error { r.size = n.Size; return nil }); !ok {
		return err
	}
	var failed, read int
	for _, p := range r.c.Base.Probes {
		n := min(int64(len(p.B)), r.size-p.Off)
		if n <= 0 {
			continue
		}
		parts := []int64{n}
		for i := 0; i < len(parts); i++ {
			off, n := p.Off, n
			if i > 0 {
				off, n = p.Off+parts[i], min(max(pageSize, r.c.Base.cs()), n-parts[i])
			}
			buf := make([]byte, n)
			ok, err := r.request(fmt.Sprintf("read %d+%d", off, n), func(c *daemon.NBD) error { return c.ReadAt(buf, off) })
			if err != nil {
				return err
			}
			if ok || i > 0 {
				r.trace = r.trace[:len(r.trace)-1] // of no interest
			}
			if ok {
				read++
				if learn {
					r.m.learn(off, buf)
				} else if at := r.m.wrong(off, buf, r.ignore); at >= 0 {
					return r.lost(at, later)
				}
				continue
			}
			failed++
			for at := int64(0); i == 0 && at < n; at += max(pageSize, r.c.Base.cs()) {
				parts = append(parts, at) // in smaller parts
			}
		}
	}
	r.note("read all: %d parts, %d failed", read, failed)
	return nil
}

// lost is the failure of a sector that shows what it must not.
func (r *run) lost(off int64, later bool) error {
	kind := "data not written to have changed"
	if r.m.touched[off/sector] {
		kind = "acknowledged data are lost"
	}
	if r.rep.At(off) == Uncounted {
		kind += " (uncounted cluster)"
	}
	when := ""
	if later {
		when = " after closing and opening"
	}
	return &Failure{kind, fmt.Sprintf("at %d (cluster %d of the disk)%s", off, off>>r.c.Base.ClusterBits, when), false}
}

// steps is how many random steps a case has.
const steps = 10

// readWrite opens the image for writing, or an overlay of it, and does this and that.
func (r *run) readWrite() error {
	r.over = r.r.IntN(4) == 0
	ok, err := r.open()
	if !ok || err != nil {
		return err
	}
	if err := r.export(true); err != nil {
		return err
	}
	if err := r.query(); err != nil {
		return err
	}
	if !r.over {
		if err := r.readAll(false, true); err != nil {
			return err
		}
	} else if err := r.readAll(true, true); err != nil {
		return err
	}
	for range steps {
		if err := r.step(); err != nil {
			return err
		}
	}
	if err := r.readAll(false, false); err != nil {
		return err
	}
	if err := r.flush(); err != nil {
		return err
	}
	if err := r.status(); err != nil {
		return err
	}
	if err := r.query(); err != nil {
		return err
	}
	if err := r.close(); err != nil {
		return err
	}
	r.m.unflushed()
	switch {
	case r.over:
		r.m.may = map[int64][]uint64{} // the overlay is gone
	case r.below != nil:
		r.m.may = r.below
	}
	if r.renamed {
		maps.DeleteFunc(r.m.may, func(s int64, _ []uint64) bool { return !r.m.touched[s] })
	}
	return nil
}

func file(name string) args { return args{"driver": "file", "filename": name, "discard": "unmap"} }

// open opens for writing.
func (r *run) open() (bool, error) {
	r.now, r.image = "", "d"
	o := r.options("d")
	if !r.over {
		ok, err := r.try("blockdev-add", o)
		if ok {
			r.nodes = []string{"d"}
		}
		return ok, err
	}
	b := NewBase(Spec{Version: 3, ClusterBits: 16, Order: 4, Size: max(512, min(r.c.Base.Size, 1<<30)), Backing: imageName, BackingFormat: "qcow2"})
	if err := b.WriteEmpty(r.path("over.qcow2")); err != nil {
		return false, err
	}
	o = args{"driver": "qcow2", "node-name": "d", "discard": "unmap", "file": file("over.qcow2")}
	r.image = ""
	if r.r.IntN(2) == 0 {
		r.image = "base"
		o["backing"] = args{"driver": "qcow2", "node-name": "base", "read-only": true, "file": args{"driver": "file", "filename": imageName, "read-only": true}}
	}
	ok, err := r.try("blockdev-add", o)
	if ok {
		r.nodes = []string{"d"}
	}
	return ok, err
}

// options of the image, some of them not the default's.
func (r *run) options(node string) args {
	o := args{"driver": "qcow2", "node-name": node, "discard": "unmap", "file": file(imageName)}
	for _, x := range []struct {
		name string
		v    any
	}{{"lazy-refcounts", true}, {"l2-cache-entry-size", 512}, {"overlap-check", "all"}, {"detect-zeroes", "unmap"}, {"discard-no-unref", true}, {"cache-size", 1 << 20}} {
		if r.r.IntN(8) == 0 && (r.c.Base.Version >= 3 || x.name != "lazy-refcounts" && x.name != "discard-no-unref") {
			o[x.name] = x.v
		}
	}
	return o
}

// where chooses a range of the disk.
func (r *run) where() (off, n int64) {
	probes := r.c.Base.Probes
	if len(probes) == 0 {
		return 0, 512
	}
	cs := r.c.Base.cs()
	if r.c.Base.ClusterBits == 21 || r.r.IntN(3) == 0 {
		p := probes[r.r.IntN(len(probes))]
		off, n = p.Off, int64(len(p.B))
		if r.r.IntN(4) == 0 {
			off, n = off&^(cs-1), cs
		}
	} else {
		// Clusters of the first table, where everything is.
		off = r.r.Int64N(16) * cs
		n = cs * (1 + r.r.Int64N(3))
		if r.r.IntN(3) == 0 {
			off += r.r.Int64N(cs/sector) * sector
			n = sector
		}
	}
	off = min(off, max(0, r.size-sector)) &^ (sector - 1)
	return off, max(0, min(n, r.size-off, 128<<10)) &^ (sector - 1)
}

// step does something at random.
func (r *run) step() error {
	ops := []struct {
		weight int
		f      func() error
	}{{20, r.write}, {8, r.zero}, {10, r.trim}, {6, r.read}, {5, r.flush}, {2, r.status}, {6, r.resize}, {6, r.snapshot}, {6, r.deleteSnapshot},
		{10, r.bitmap}, {3, r.stream}, {3, r.backup}, {4, r.changeBacking}, {3, r.amend}, {4, r.reopen}, {3, r.overlay}, {3, r.commit}, {2, r.mirror}, {5, r.burst}}
	sum := 0
	for _, o := range ops {
		sum += o.weight
	}
	i := r.r.IntN(sum)
	for _, o := range ops {
		if i -= o.weight; i < 0 {
			return o.f()
		}
	}
	return nil
}

func (r *run) write() error {
	off, n := r.where()
	if n == 0 {
		return nil
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.r.Uint32())
	}
	ok, err := r.request(fmt.Sprintf("write %d+%d", off, n), func(c *daemon.NBD) error { return c.WriteAt(b, off) })
	if ok {
		r.m.wrote(off, b)
	} else {
		r.m.forget(off, n)
	}
	return err
}

func (r *run) zero() error {
	off, n := r.where()
	ok, err := r.request(fmt.Sprintf("zero %d+%d", off, n), func(c *daemon.NBD) error { return c.Zero(off, int(n)) })
	if ok {
		r.m.zeroed(off, n, false)
	} else {
		r.m.forget(off, n)
	}
	return err
}

func (r *run) trim() error {
	off, n := r.where()
	ok, err := r.request(fmt.Sprintf("trim %d+%d", off, n), func(c *daemon.NBD) error { return c.Trim(off, int(n)) })
	if ok && !r.over && r.below == nil && r.c.Base.Backing == "" {
		r.m.zeroed(off, n, true)
	} else {
		r.m.forget(off, n)
	}
	return err
}

func (r *run) read() error {
	off, n := r.where()
	if n == 0 {
		return nil
	}
	b := make([]byte, n)
	ok, err := r.request(fmt.Sprintf("read %d+%d", off, n), func(c *daemon.NBD) error { return c.ReadAt(b, off) })
	if ok {
		if at := r.m.wrong(off, b, r.ignore); at >= 0 {
			return r.lost(at, false)
		}
	}
	return err
}

func (r *run) flush() error {
	ok, err := r.request("flush", func(c *daemon.NBD) error { return c.Flush() })
	if ok {
		r.m.flushed()
	}
	return err
}

// burst has several clients write at the same time, each to sectors of its own, some of them in
// clusters of others.
func (r *run) burst() error {
	const clients, writes = 3, 8
	if r.size < clients*writes*sector {
		return nil
	}
	type done struct {
		off int64
		b   []byte
		err error
	}
	var all [clients][]done
	var wait sync.WaitGroup
	end := time.Now().Add(r.s.limits.Deadline)
	reach := min(r.size, 16*r.c.Base.cs()) / sector
	first := r.r.Int64N(reach)
	for i := range clients {
		for k := range writes {
			at := (first + int64(k)*7*clients) % (reach / clients) * clients
			b := make([]byte, sector)
			b[0], b[1], b[2] = byte(i), byte(k), byte(first)
			all[i] = append(all[i], done{off: (at + int64(i)) * sector, b: b})
		}
		wait.Go(func() {
			n, err := daemon.DialNBDBy(r.s.nbd(), "x", end)
			if err != nil {
				all[i] = nil
				return
			}
			defer n.Drop()
			for k := range all[i] {
				d := &all[i][k]
				d.err = n.WriteAt(d.b, d.off)
			}
		})
	}
	wait.Wait()
	failed := 0
	for _, l := range all {
		for _, d := range l {
			switch {
			case os.IsTimeout(d.err):
				return &Failure{"no answer to write", fmt.Sprintf("one of several at %d", d.off), true}
			case d.err != nil:
				failed++
				r.m.forget(d.off, sector)
			default:
				r.m.wrote(d.off, d.b)
			}
		}
	}
	r.note("a burst of writes from sector %d on: %d failed", first, failed)
	return nil
}
