package hostile

import (
	"fmt"
	"os"
	"sync"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/tests/daemon"
	"qblockd/tests/trial"
)

// op is something that a case does at random.
type op struct {
	weight int
	do     func(*run)
}

var ops = []op{
	{20, (*run).write}, {8, (*run).zero}, {10, (*run).trim}, {6, (*run).read}, {5, (*run).flush},
	{2, (*run).status}, {6, (*run).resize}, {6, (*run).snapshot}, {6, (*run).deleteSnapshot}, {10, (*run).bitmap},
	{3, (*run).stream}, {3, (*run).backup}, {4, (*run).changeBacking}, {3, (*run).amend}, {4, (*run).reopen},
	{3, (*run).overlay}, {3, (*run).commit}, {2, (*run).mirror}, {5, (*run).burst},
}

// covered is how many bytes all extents of a status tell of.
func covered(m map[string][]nbdwire.Extent) (n int64) {
	for _, l := range m {
		sum := int64(0)
		for _, e := range l {
			sum += int64(e.N)
		}
		if n == 0 || sum < n {
			n = sum
		}
	}
	return n
}

// readAt reads a range.
func (r *run) readAt(off, n int64) (b []byte, ok bool) {
	b = make([]byte, n)
	ok = r.request(fmt.Sprintf("read %d+%d", off, n), func(c *daemon.NBD) error { return c.ReadAt(b, off) })
	return b, ok
}

// compare ends the case where what was read is not what the disk may show.
func (r *run) compare(off int64, b []byte, when string) {
	// Nothing can be expected of a sector if the entry that leads to it cannot be followed.
	at := r.m.wrong(off, b, func(off int64) bool { return r.rep.At(off) >= Unusable })
	if at < 0 {
		return
	}
	kind := "data not written to have changed"
	if r.m.touched[at/sector] {
		kind = "acknowledged data are lost"
	}
	if r.rep.At(at) == Uncounted {
		kind += " (uncounted cluster)"
	}
	fail(false, kind, "at %d (cluster %d of the disk)%s", at, at>>r.c.Base.ClusterBits, when)
}

// readAll reads the probes, in smaller parts where that fails. With learn what is read is taken as
// right, else it is compared. With later the disk was closed in between.
func (r *run) readAll(learn, later bool) {
	if !r.request("read all", func(n *daemon.NBD) error { r.size = n.Size; return nil }) {
		return
	}
	when := ""
	if later {
		when = " after closing and opening"
	}
	failed, read := 0, 0
	part := func(off, n int64, small bool) bool {
		b, ok := r.readAt(off, n)
		if ok || small {
			r.trace = r.trace[:len(r.trace)-1] // of no interest
		}
		switch {
		case !ok:
			failed++
			return false
		case learn:
			r.m.learn(off, b)
		default:
			r.compare(off, b, when)
		}
		read++
		return true
	}
	step := max(pageSize, r.c.Base.cs())
	for _, p := range r.c.Base.Probes {
		n := min(int64(len(p.B)), r.size-p.Off)
		if n <= 0 || part(p.Off, n, false) {
			continue
		}
		for at := int64(0); at < n; at += step {
			part(p.Off+at, min(step, n-at), true)
		}
	}
	r.note("read all: %d parts, %d failed", read, failed)
}

// where chooses a range of the disk.
func (r *run) where() (off, n int64) {
	probes := r.c.Base.Probes
	if len(probes) == 0 {
		return 0, 512
	}
	cs := r.c.Base.cs()
	if r.c.Base.ClusterBits == 21 || r.r.IntN(3) == 0 {
		p := trial.Pick(r.r, probes...)
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

// change makes a request that changes a range, which is unknown if that fails.
func (r *run) change(what string, off, n int64, f func(c *daemon.NBD) error) (ok bool) {
	if ok = r.request(fmt.Sprintf("%s %d+%d", what, off, n), f); !ok {
		r.m.forget(off, n)
	}
	return ok
}

func (r *run) write() {
	off, n := r.where()
	if n == 0 {
		return
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.r.Uint32())
	}
	if r.change("write", off, n, func(c *daemon.NBD) error { return c.WriteAt(b, off) }) {
		r.m.wrote(off, b)
	}
}

func (r *run) zero() {
	off, n := r.where()
	if r.change("zero", off, n, func(c *daemon.NBD) error { return c.Zero(off, int(n)) }) {
		r.m.zeroed(off, n, false)
	}
}

func (r *run) trim() {
	off, n := r.where()
	if !r.change("trim", off, n, func(c *daemon.NBD) error { return c.Trim(off, int(n)) }) {
		return
	}
	if r.over || r.below != nil || r.c.Base.Backing != "" {
		r.m.forget(off, n) // what lies below may show
	} else {
		r.m.zeroed(off, n, true)
	}
}

func (r *run) read() {
	off, n := r.where()
	if n == 0 {
		return
	}
	if b, ok := r.readAt(off, n); ok {
		r.compare(off, b, "")
	}
}

func (r *run) flush() {
	if r.request("flush", (*daemon.NBD).Flush) {
		r.m.flushed()
	}
}

// burst has several clients write at the same time, each to sectors of its own, some of them in
// clusters of others.
func (r *run) burst() {
	const clients, writes = 3, 8
	if r.size < clients*writes*sector {
		return
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
				fail(true, "no answer to write", "one of several at %d", d.off)
			case d.err != nil:
				failed++
				r.m.forget(d.off, sector)
			default:
				r.m.wrote(d.off, d.b)
			}
		}
	}
	r.note("a burst of writes from sector %d on: %d failed", first, failed)
}
